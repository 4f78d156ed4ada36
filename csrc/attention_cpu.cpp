// Attention on the CPU: an operation is cut into tiles that threads take in turn, head by head, of each head the longest
// first. What a tile computes depends neither on the thread that takes it nor on how many there are, nor on what else is
// packed beside its scene, and all sums have one order.
#include "attention_cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "threads.h"

namespace lct {
namespace {

// Backward: key rows of a part, and parts of a scene and key head, each of which holds its own gradient of queries. They
// follow from the scene alone: bits must depend neither on threads nor on neighbours.
constexpr int kPartRows = 512, kMostParts = 4;
constexpr int kTasksPerThread = 16;  // so that the last ones to end are short

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(int64_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, sizeof(float) * std::max<int64_t>(floats, 1))) throw std::bad_alloc();
  return Buffer(static_cast<float*>(data));
}

// Of this thread, kept from call to call.
float* scratch(int64_t floats) {
  thread_local Buffer kept;
  thread_local int64_t size = 0;
  if (size < floats) {
    kept = buffer(floats);
    size = floats;
  }
  return kept.get();
}

const std::vector<const TileKernels*>& able() {
  static const std::vector<const TileKernels*> found = [] {
    std::vector<const TileKernels*> all;
#ifdef LCT_X86
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f")) all.push_back(&kAvx512Tile);
    if (fma) all.push_back(&kAvx2Tile);
#endif
    all.push_back(&kPortableTile);
    return all;
  }();
  return found;
}

const TileKernels* chosen(const char* isa) {
  for (const TileKernels* kernels : able())
    if (!*isa || !std::strcmp(isa, kernels->name)) return kernels;
  return nullptr;
}

struct Tile {
  const int32_t* run;
  int64_t first;
  int count;
};

bool before(const Tile& a, const Tile& b) { return a.first < b.first; }

int64_t seen(const int32_t* run, int intervals) {
  int64_t rows = 0;
  for (int i = 0; i < intervals; ++i) rows += run[3 + 2 * i] - run[2 + 2 * i];
  return rows;
}

// Of all runs that see anything, in the table's order, at most `most` rows each.
std::vector<Tile> tiles_of(const RunTable& runs, int most) {
  std::vector<Tile> tiles;
  for (int i = 0; i < runs.runs; ++i)
    if (seen(runs[i], runs.intervals()))
      for (int64_t first = runs[i][0], end = runs[i][1]; first < end; first += most)
        tiles.push_back({runs[i], first, int(std::min<int64_t>(end - first, most))});
  return tiles;
}

// Query rows of a forward task: tiles share a look at the keys where that leaves every thread tasks enough. It changes
// no bit.
int rows_of_task(const AttentionSizes& z, int threads) {
  const int64_t tiles = z.q_rows / kTile * z.heads / (int64_t(kTasksPerThread) * std::max(threads, 1));
  return kTile * int(std::clamp<int64_t>(tiles, 1, kForwardTiles));
}

// Calls body(begin, end) for the rows that no tile has.
template <class Body>
void each_gap(std::vector<Tile> tiles, int64_t rows, Body body) {
  std::sort(tiles.begin(), tiles.end(), before);
  int64_t covered = 0;
  for (const Tile& tile : tiles) {
    if (covered < tile.first) body(covered, tile.first);
    covered = tile.first + tile.count;
  }
  if (covered < rows) body(covered, rows);
}

float* row_of(const Rows& x, int64_t row, int head) {
  return static_cast<float*>(x.data) + row * x.row + head * x.head;
}

void clear(const Rows& x, int64_t begin, int64_t end, int heads, int dim) {
  for (int64_t row = begin; row < end; ++row)
    for (int head = 0; head < heads; ++head)
      std::memset(row_of(x, row, head), 0, sizeof(float) * dim);
}

// Key tiles that one task goes through for one key head, and where it adds up its part of dq: in rows of its own or,
// where it is all of its scene, in dq itself.
struct Part {
  int begin, end;
  bool whole;
  PartialDq dq;
  Buffer data;
};

struct Range {
  int64_t lo, hi;
};

// From the first to the last query that sees some tiles.
Range reach(const Tile* tiles, int count, int intervals) {
  Range range{INT64_MAX, 0};
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < intervals; ++j)
      if (const int32_t lo = tiles[i].run[2 + 2 * j], hi = tiles[i].run[3 + 2 * j]; lo < hi)
        range = {std::min<int64_t>(range.lo, lo), std::max<int64_t>(range.hi, hi)};
  return range;
}

// Parts of about equal work, scene by scene: a scene ends where its queries do. Of each, one for every key head.
std::vector<Part> parts_of(const std::vector<Tile>& tiles, const RunTable& runs, int kv_heads) {
  const int count = int(tiles.size()), intervals = runs.intervals();
  std::vector<Part> parts;
  int64_t done = 0;  // query rows of the scenes so far
  bool apart = true;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    std::vector<int64_t> pairs{0};  // before each tile of the scene
    int64_t rows = 0;
    Range scene{INT64_MAX, 0};
    for (; end < count; ++end) {
      const Range tile = reach(&tiles[end], 1, intervals);
      if (end > begin && (tile.lo >= scene.hi || tile.hi <= scene.lo)) break;
      scene = {std::min(scene.lo, tile.lo), std::max(scene.hi, tile.hi)};
      rows += tiles[end].count;
      pairs.push_back(pairs.back() + tiles[end].count * seen(tiles[end].run, intervals));
    }
    apart = apart && scene.lo >= done;
    done = std::max(done, scene.hi);
    const int64_t wanted = std::clamp<int64_t>(rows / kPartRows, 1, kMostParts);
    for (int64_t i = 1, first = begin; i <= wanted; ++i) {
      const auto until = std::lower_bound(pairs.begin(), pairs.end(), pairs.back() * i / wanted);
      const int last = begin + int(until - pairs.begin());
      const Range seen_by = reach(tiles.data() + first, int(last - first), intervals);
      for (int head = 0; head < kv_heads && first < last; ++head)
        parts.push_back({int(first), last, wanted == 1, {nullptr, seen_by.lo, seen_by.hi - seen_by.lo, 0, 0}, nullptr});
      first = last;
    }
  }
  for (Part& part : parts) part.whole = part.whole && apart;
  return parts;
}

}  // namespace

const char* attention_isas() {
  static const std::string names = [] {
    std::string all;
    for (const TileKernels* kernels : able()) all += (all.empty() ? "" : " ") + std::string(kernels->name);
    return all;
  }();
  return names.c_str();
}

bool attention_forward_cpu(const AttentionForward& p, const char* isa, int threads) {
  const TileKernels* kernels = chosen(isa);
  if (!kernels) return false;
  const AttentionSizes& z = p.sizes;
  const std::vector<Tile> tiles = tiles_of(p.runs, rows_of_task(z, threads));
  each_gap(tiles, z.q_rows, [&](int64_t begin, int64_t end) {
    clear(p.out, begin, end, z.heads, z.dim);
    for (int head = 0; head < z.heads; ++head)
      std::fill(p.lse + head * z.q_rows + begin, p.lse + head * z.q_rows + end, -std::numeric_limits<float>::infinity());
  });
  const int64_t count = int64_t(tiles.size());
  parallel(count * z.heads, threads, [&](int64_t task) {  // head by head: its keys stay in the caches
    const Tile& tile = tiles[task % count];
    kernels->forward(p, tile.run, tile.first, tile.count, int(task / count), scratch(kernels->forward_floats(z.dim)));
  });
  return true;
}

bool attention_backward_cpu(const AttentionBackward& p, const char* isa, int threads) {
  const TileKernels* kernels = chosen(isa);
  if (!kernels) return false;
  const AttentionSizes& z = p.sizes;
  const int group = z.heads / z.kv_heads, width = (z.dim + kernels->lanes - 1) / kernels->lanes * kernels->lanes;
  const std::vector<Tile> tiles = tiles_of(p.runs, kTile);
  std::vector<Tile> key_tiles = tiles_of(p.key_runs, kBackwardTiles * kTile);
  std::sort(key_tiles.begin(), key_tiles.end(), before);
  each_gap(key_tiles, z.k_rows, [&](int64_t begin, int64_t end) {
    clear(p.dk, begin, end, z.kv_heads, z.dim);
    clear(p.dv, begin, end, z.kv_heads, z.dim);
  });
  const Buffer delta = buffer(z.heads * z.q_rows);
  const int64_t count = int64_t(tiles.size());
  parallel(count * z.heads, threads, [&](int64_t task) {
    const Tile& tile = tiles[task % count];
    const int head = int(task / count);
    kernels->delta(p, tile.first, tile.count, head, delta.get() + head * z.q_rows + tile.first);
  });
  const bool fits = reinterpret_cast<uintptr_t>(p.dq.data) % 64 == 0 && p.dq.row % 16 == 0 && p.dq.head % 16 == 0;
  std::vector<Part> parts = parts_of(key_tiles, p.key_runs, z.kv_heads);
  parallel(int64_t(parts.size()), threads, [&](int64_t task) {
    Part& part = parts[task];
    PartialDq& dq = part.dq;
    const int kv_head = int(task % z.kv_heads);
    part.whole = part.whole && fits && width == z.dim;
    if (part.whole) {
      dq.data = row_of(p.dq, dq.first, kv_head * group), dq.row = p.dq.row, dq.head = p.dq.head;
      clear({dq.data, dq.row, dq.head}, 0, dq.rows, group, z.dim);
    } else {
      part.data = buffer(group * dq.rows * width);
      dq.data = part.data.get(), dq.row = width, dq.head = dq.rows * width;
      std::memset(dq.data, 0, sizeof(float) * group * dq.head);
    }
    for (int i = part.begin; i < part.end; ++i) {
      const Tile& tile = key_tiles[i];
      kernels->backward(p, delta.get(), tile.run, tile.first, tile.count, kv_head, dq,
                        scratch(kernels->backward_floats(z.dim)));
    }
  });
  // A query's parts are added in the order of their keys.
  const int64_t chunks = (z.q_rows + kTile - 1) / kTile;
  parallel(chunks * z.heads, threads, [&](int64_t task) {
    const int head = int(task / chunks);
    for (int64_t row = task % chunks * kTile, end = std::min(row + kTile, z.q_rows); row < end; ++row) {
      float* to = row_of(p.dq, row, head);
      bool begun = false;
      for (size_t i = head / group; i < parts.size(); i += z.kv_heads) {
        const PartialDq& dq = parts[i].dq;
        if (row < dq.first || row >= dq.first + dq.rows) continue;
        if (parts[i].whole) {
          begun = true;
          break;
        }
        const float* from = dq.data + (head % group) * dq.head + (row - dq.first) * dq.row;
        for (int d = 0; d < z.dim; ++d) to[d] = begun ? to[d] + from[d] : from[d];
        begun = true;
      }
      if (!begun) std::memset(to, 0, sizeof(float) * z.dim);
    }
  });
  return true;
}

}  // namespace lct
