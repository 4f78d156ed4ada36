// QK-norm, 3D RoPE and the way into joint order, cache rows or the history pool: who does what, and what a team does.
//
// A block is a few rows of one stream (the first blocks are the text's) by one chunk of their heads. A team takes a row
// and walks the heads: the angles of a lane's four channel pairs are formed once and stay in registers, QKV is read
// once (again, from cache, where the norm runs over all heads of a row), and results lie where attention reads them.
#pragma once

#include "common.cuh"
#include "params.h"

namespace lct {

constexpr int kPairs = kChannels / 2;
constexpr int kFewestHeads = 4;  // of a chunk: angles are formed anew for every chunk

// -- who does what ----------------------------------------------------------------------------------------------------

struct Range {
  int first, last;
};

struct Place {
  int stream;
  int64_t block;  // of the stream
  int64_t row;    // of the stream
  bool exists;    // a stream's last block may have teams to spare
};

HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The power of two that holds D channels.
HD int lanes_of(int dim) {
  int lanes = 1;
  while (lanes * kChannels < dim) lanes *= 2;
  return lanes;
}

HD int teams_of(const Sizes& sizes) { return kThreads / sizes.lanes; }

HD int64_t blocks_of(const Sizes& sizes, int stream) { return ceil_div(sizes.rows[stream], teams_of(sizes)); }

HD int64_t blocks_of(const Sizes& sizes) { return blocks_of(sizes, 0) + blocks_of(sizes, 1); }

// Splits the heads of a row until there are `wanted` blocks. A norm over all heads needs all of q, or k, in one chunk.
HD Sizes sizes_of(int heads, int kv_heads, int dim, bool by_row, int64_t texts, int64_t videos, int64_t wanted) {
  Sizes sizes{heads, kv_heads, dim, by_row, {texts, videos}, lanes_of(dim), 3, 0};
  if (by_row) return sizes;
  const int64_t total = heads + 2 * kv_heads, blocks = blocks_of(sizes);
  int64_t chunks = blocks ? ceil_div(wanted, blocks) : 1;
  if (chunks > total / kFewestHeads) chunks = total / kFewestHeads;
  sizes.chunk_heads = int(ceil_div(total, chunks > 1 ? chunks : 1));
  sizes.chunks = int(ceil_div(total, sizes.chunk_heads));
  return sizes;
}

HD Place place_of(const Sizes& sizes, int64_t block, int team) {
  const int64_t texts = blocks_of(sizes, 0);
  const int stream = block >= texts;
  if (stream) block -= texts;
  const int64_t row = block * teams_of(sizes) + team;
  return {stream, block, row, row < sizes.rows[stream]};
}

HD Range common(Range a, Range b) {
  return {a.first > b.first ? a.first : b.first, a.last < b.last ? a.last : b.last};
}

// Of the heads of a QKV row: section 0 is q, 1 is k, 2 is v.
HD Range section_of(const Sizes& sizes, int section) {
  const int first = section ? sizes.heads + (section - 1) * sizes.kv_heads : 0;
  return {first, first + (section ? sizes.kv_heads : sizes.heads)};
}

HD Range chunk_of(const Sizes& sizes, int chunk) {
  if (sizes.by_row) return section_of(sizes, chunk);
  return common({chunk * sizes.chunk_heads, (chunk + 1) * sizes.chunk_heads}, {0, sizes.heads + 2 * sizes.kv_heads});
}

// Norm weights' gradients are summed block by block: where a block's sums go, and how many such rows a stream has.
HD int64_t partial_rows_of(const Sizes& sizes, int stream) {
  return blocks_of(sizes, stream) * (sizes.by_row ? 1 : sizes.chunks);
}

HD int64_t partial_row_of(const Sizes& sizes, int64_t block, int chunk) {
  return sizes.by_row ? block : block * sizes.chunks + chunk;
}

HD int pair_of(int lane, int i) { return lane * kPairs + i; }

HD int channel_of(int lane) { return lane * kChannels; }

HD int64_t offset_of(const Rows& rows, int64_t row, int head, int lane) {
  return row * rows.row + int64_t(head) * rows.head + channel_of(lane);
}

// -- what a lane does -------------------------------------------------------------------------------------------------

template <class T>
HD Packed<T> load(const Rows& rows, int64_t row, int head, int lane) {
  return load(static_cast<const T*>(rows.data) + offset_of(rows, row, head, lane));
}

template <class T>
HD void store(const Rows& rows, int64_t row, int head, int lane, const Packed<T>& x) {
  store(static_cast<T*>(rows.data) + offset_of(rows, row, head, lane), x);
}

HD Eight load_weights(const float* weights, int lane) { return unpack(load(weights + channel_of(lane))); }

struct Turns {
  float cos[kPairs], sin[kPairs];
};

// cos and sin of some turns. In fp64 up to the rest of the nearest quarter turn: a plain fp32 product of position and
// frequency is off by 1e-3 radians at position 1e5. The polynomials (of the Cephes library) are within 1e-7.
HD void turn(double turns, float& cos, float& sin) {
  const double rounder = 6755399441055744.0;  // 1.5 · 2^52: a sum with it has no room for fractions
  const double quarters = 4 * turns + rounder;
  const float x = float((turns - (quarters - rounder) * 0.25) * 6.283185307179586), xx = x * x;
  const float c = ((2.443315711809948e-5f * xx - 1.388731625493765e-3f) * xx + 4.166664568298827e-2f) * xx * xx -
                  0.5f * xx + 1.0f;
  const float s = ((-1.9515295891e-4f * xx + 8.3321608736e-3f) * xx - 1.6666654611e-1f) * xx * x + x;
  uint64_t quadrant;
  memcpy(&quadrant, &quarters, sizeof quadrant);
  const float along = quadrant & 1 ? s : c, across = quadrant & 1 ? c : s;
  cos = (quadrant + 1) & 2 ? -along : along;
  sin = quadrant & 2 ? -across : across;
}

HD Turns turns_of(const Rope& rope, int64_t row, int lane) {
  Turns turns;
  for (int i = 0; i < kPairs; ++i) {
    const int pair = pair_of(lane, i);
    const bool turned = pair < rope.pairs;
    const double position = turned ? rope.positions[row * 3 + rope.axes[pair]] : 0;
    turn(position * (turned ? rope.frequencies[pair] : 0), turns.cos[i], turns.sin[i]);
  }
  return turns;
}

// Channel pairs (2m, 2m + 1) turned forward, or back with way = -1.
HD Eight rotate(const Eight& x, const Turns& turns, float way = 1) {
  Eight out;
  for (int i = 0; i < kPairs; ++i) {
    const float even = x.x[2 * i], odd = x.x[2 * i + 1], cos = turns.cos[i], sin = way * turns.sin[i];
    out.x[2 * i] = even * cos - odd * sin;
    out.x[2 * i + 1] = even * sin + odd * cos;
  }
  return out;
}

HD float dot(const Eight& a, const Eight& b) {
  float total = 0;
  for (int i = 0; i < kChannels; ++i) total += a.x[i] * b.x[i];
  return total;
}

HD Eight times(const Eight& a, const Eight& b) {
  Eight out;
  for (int i = 0; i < kChannels; ++i) out.x[i] = a.x[i] * b.x[i];
  return out;
}

HD Eight times(const Eight& a, float b) {
  Eight out;
  for (int i = 0; i < kChannels; ++i) out.x[i] = a.x[i] * b;
  return out;
}

HD float inverse_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1 / sqrtf(x);
#endif
}

// -- forward ----------------------------------------------------------------------------------------------------------

// One row of rows; data null: none.
struct Target {
  Rows rows;
  int64_t row;
};

HD Target target_of(const Rows& rows, const int64_t* slots, int64_t joint) {
  return {rows, rows.data && slots ? slots[joint] : joint};
}

// Norms and turns the heads of `section` that are in `chunk` into `out`, and unturned into `raw`.
template <class T, class Team, class Lanes>
HD void join_heads(const Team& team, const JoinParams& p, const Lanes& turns, const Target& from, Range chunk,
                   int section, const float* weights, const Target& out, const Target& raw) {
  const Range all = section_of(p.sizes, section), heads = common(all, chunk);
  if (heads.first >= heads.last) return;
  typename Team::template Lane<Packed<T>> ahead;
  typename Team::template Lane<Eight> x, weight;
  const float share = 1.0f / (float(p.sizes.by_row ? all.last - all.first : 1) * p.sizes.dim);
  float inverse = 0;
  if (p.sizes.by_row) {
    const float squares = team.sum([&](int lane) {
      float total = 0;
      for (int head = all.first; head < all.last; ++head) {
        const Eight y = unpack(load<T>(from.rows, from.row, head, lane));
        total += dot(y, y);
      }
      return total;
    });
    inverse = inverse_root(squares * share + p.eps);
  }
  team.each([&](int lane) {
    ahead[lane] = load<T>(from.rows, from.row, heads.first, lane);
    if (!p.sizes.by_row) weight[lane] = load_weights(weights, lane);
  });
  for (int head = heads.first; head < heads.last; ++head) {
    const int to = head - all.first;
    team.each([&](int lane) {
      x[lane] = unpack(ahead[lane]);
      // The next head is on its way while this one is computed.
      if (head + 1 < heads.last) ahead[lane] = load<T>(from.rows, from.row, head + 1, lane);
      if (p.sizes.by_row) weight[lane] = load_weights(weights + int64_t(to) * p.sizes.dim, lane);
    });
    if (!p.sizes.by_row)
      inverse = inverse_root(team.sum([&](int lane) { return dot(x[lane], x[lane]); }) * share + p.eps);
    team.each([&](int lane) {
      const Eight normed = times(times(x[lane], inverse), weight[lane]);
      if (raw.rows.data) store(raw.rows, raw.row, to, lane, pack<T>(normed));
      store(out.rows, out.row, to, lane, pack<T>(rotate(normed, turns[lane])));
    });
  }
}

// Heads [first, last) as they are, into `out` and `also`, from head `to` on.
template <class T, class Team>
HD void copy_heads(const Team& team, const Target& from, Range heads, int to, const Target& out, const Target& also) {
  for (int head = heads.first; head < heads.last; ++head, ++to)
    team.each([&](int lane) {
      const Packed<T> x = load<T>(from.rows, from.row, head, lane);
      store(out.rows, out.row, to, lane, x);
      if (also.rows.data) store(also.rows, also.row, to, lane, x);
    });
}

template <class T, class Team>
HD void join_body(const Team& team, const JoinParams& p, int64_t block, int chunk) {
  const Place place = place_of(p.sizes, block, team.index());
  if (!place.exists) return;
  const Stream& stream = p.streams[place.stream];
  const int64_t joint = stream.joint[place.row];
  const Target from{stream.qkv, place.row}, nowhere{};
  const Range mine = chunk_of(p.sizes, chunk), values = section_of(p.sizes, 2), some = common(values, mine);
  typename Team::template Lane<Turns> turns;
  team.each([&](int lane) { turns[lane] = turns_of(p.rope, joint, lane); });
  join_heads<T>(team, p, turns, from, mine, 0, stream.q_norm, Target{p.q, joint}, nowhere);
  join_heads<T>(team, p, turns, from, mine, 1, stream.k_norm, target_of(p.context.k, p.context.slots, joint),
                target_of(p.pool.k, p.pool.slots, joint));
  copy_heads<T>(team, from, some, some.first - values.first, target_of(p.context.v, p.context.slots, joint),
                target_of(p.pool.v, p.pool.slots, joint));
}

// A row of a context: keys of the pool turned to their new positions, and values. There are no queries.
template <class T, class Team>
HD void assemble_body(const Team& team, const AssembleParams& p, int64_t block, int chunk) {
  const Place place = place_of(p.sizes, block, team.index());
  if (!place.exists) return;
  const int64_t source = p.pool.slots[place.row], slot = p.context.slots[place.row];
  const Range mine = chunk_of(p.sizes, chunk), keys = common(section_of(p.sizes, 1), mine);
  const Range values = common(section_of(p.sizes, 2), mine);
  typename Team::template Lane<Turns> turns;
  team.each([&](int lane) {
    if (keys.first < keys.last) turns[lane] = turns_of(p.rope, place.row, lane);
  });
  for (int head = keys.first; head < keys.last; ++head)
    team.each([&](int lane) {
      const Eight x = unpack(load<T>(p.pool.k, source, head, lane));
      store(p.context.k, slot, head, lane, pack<T>(rotate(x, turns[lane])));
    });
  const int head = values.first - p.sizes.kv_heads;
  copy_heads<T>(team, {p.pool.v, source}, {head, values.last - p.sizes.kv_heads}, head, {p.context.v, slot}, Target{});
}

// -- backward ---------------------------------------------------------------------------------------------------------

// With y = x·r·w, r = 1/rms, x̂ = x·r, g = dy·w: dx = r (g − x̂ · mean(g·x̂)); Σ dy·x̂ of a block's rows to d_weights.
// Teams without a row come along, for the sum over the block needs all of them.
template <class T, class Team, class Lanes>
HD void backward_heads(const Team& team, const BackwardParams& p, const Lanes& turns, const Place& place,
                       const Target& from, Range chunk, int section, const float* weights, const Target& upstream,
                       const Target& to, float* d_weights) {
  const Range all = section_of(p.sizes, section), heads = common(all, chunk);
  const bool by_row = p.sizes.by_row;
  if (by_row && heads.first >= heads.last) return;
  const float share = 1.0f / (float(by_row ? all.last - all.first : 1) * p.sizes.dim);
  typename Team::template Lane<Eight> x, dy, weight, total;
  float inverse = 0, mean = 0;
  const auto read = [&](int head, int lane) {
    x[lane] = unpack(load<T>(from.rows, from.row, head, lane));
    dy[lane] = rotate(unpack(load<T>(upstream.rows, upstream.row, head - all.first, lane)), turns[lane], -1);
    if (by_row) weight[lane] = load_weights(weights + int64_t(head - all.first) * p.sizes.dim, lane);
  };
  const auto statistics = [&](float squares, float products) {
    inverse = inverse_root(squares * share + p.eps);
    mean = products * inverse * share;
  };
  team.each([&](int lane) {
    total[lane] = Eight{};
    if (!by_row) weight[lane] = load_weights(weights, lane);
  });
  if (by_row && place.exists) {
    typename Team::template Lane<float> squares, products;
    team.each([&](int lane) {
      squares[lane] = products[lane] = 0;
      for (int head = all.first; head < all.last; ++head) {
        read(head, lane);
        squares[lane] += dot(x[lane], x[lane]);
        products[lane] += dot(times(dy[lane], weight[lane]), x[lane]);
      }
    });
    statistics(team.sum([&](int lane) { return squares[lane]; }), team.sum([&](int lane) { return products[lane]; }));
  }
  for (int head = heads.first; head < heads.last; ++head) {
    if (place.exists) {
      team.each([&](int lane) { read(head, lane); });
      if (!by_row)
        statistics(team.sum([&](int lane) { return dot(x[lane], x[lane]); }),
                   team.sum([&](int lane) { return dot(times(dy[lane], weight[lane]), x[lane]); }));
      team.each([&](int lane) {
        const Eight normed = times(x[lane], inverse), g = times(dy[lane], weight[lane]);
        Eight dx;
        for (int i = 0; i < kChannels; ++i) {
          dx.x[i] = inverse * (g.x[i] - normed.x[i] * mean);
          total[lane].x[i] = (by_row ? 0 : total[lane].x[i]) + dy[lane].x[i] * normed.x[i];
        }
        store(to.rows, to.row, head, lane, pack<T>(dx));
      });
    }
    if (by_row) team.add_up(d_weights + int64_t(head - all.first) * p.sizes.dim, p.sizes.dim, total);
  }
  if (!by_row) team.add_up(d_weights, p.sizes.dim, total);
}

template <class T, class Team>
HD void backward_body(const Team& team, const BackwardParams& p, int64_t block, int chunk) {
  const Place place = place_of(p.sizes, block, team.index());
  const Stream& stream = p.streams[place.stream];
  const StreamGradients& gradients = p.gradients[place.stream];
  const int64_t joint = place.exists ? stream.joint[place.row] : 0, dim = p.sizes.dim;
  const int64_t partial = partial_row_of(p.sizes, place.block, chunk);
  const Target from{stream.qkv, place.row}, to{gradients.qkv, place.row};
  const Range mine = chunk_of(p.sizes, chunk), values = section_of(p.sizes, 2), some = common(values, mine);
  typename Team::template Lane<Turns> turns;
  team.each([&](int lane) {
    if (place.exists) turns[lane] = turns_of(p.rope, joint, lane);
  });
  backward_heads<T>(team, p, turns, place, from, mine, 0, stream.q_norm, Target{p.dq, joint}, to,
                    gradients.q_norm + partial * (p.sizes.by_row ? p.sizes.heads * dim : dim));
  backward_heads<T>(team, p, turns, place, from, mine, 1, stream.k_norm, Target{p.dk, joint}, to,
                    gradients.k_norm + partial * (p.sizes.by_row ? p.sizes.kv_heads * dim : dim));
  if (place.exists)
    copy_heads<T>(team, Target{p.dv, joint}, {some.first - values.first, some.last - values.first}, some.first, to,
                  Target{});
}

}  // namespace lct
