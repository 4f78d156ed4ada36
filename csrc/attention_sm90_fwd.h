// Attention forward on Hopper: one warp copies keys and values to shared memory, two warpgroups of 64 queries compute.
//
// Blocks stay: each takes a tile of queries after the other (see `tile_at`). A tile's keys pass in steps. In step i a
// warpgroup starts the scores of keys i + 1 and, behind them, the product of weights i with values i; while the tensor
// cores work it exponentiates. The two warpgroups take turns in starting (`turn`), so that one's products run
// under the other's exponentials. Only the last tile of an interval is masked, and its values past the end are
// made 0, because 0 · NaN is NaN.
//
// Two blocks may form a cluster that computes two tiles of a run: each copies half of the keys and values, to both.
//
// The same code runs on a CPU in the tests, thread by thread, on tests/emulator/sm90_emulated.h.
#pragma once

#include "attention_sm90.h"
#ifdef __CUDACC__
#include "sm90.cuh"
#else
#include "sm90_emulated.h"
#endif

namespace lct::sm90 {

template <class T, int D, int kCluster>
class Forward {
  using Shape = ForwardShape<D>;
  static constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kStages = Shape::kStages;
  static constexpr int kCopied = kKeys / kCluster;  // rows of a key tile that this block copies
  static_assert(kCopied % 8 == 0 && kKeys % 16 == 0, "the swizzle repeats every 8 rows, products sum over 16");
  static_assert((kStages & (kStages - 1)) == 0, "the count of steps may overflow");
  static_assert(Shape::kConsumers == 2, "turns are passed from one to the other");

 public:
  struct alignas(1024) Memory {
    uint8_t q[kQueries * D * 2];
    uint8_t k[kStages][kKeys * D * 2];
    uint8_t v[kStages][kKeys * D * 2];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  static_assert(sizeof(Memory) <= kSharedBytes, "of a block");

  DEVICE Forward(Memory& memory, const AttentionForward& params, const TensorMap& q, const TensorMap& k,
                 const TensorMap& v)
      : m_(memory), p_(params), q_(q), k_(k), v_(v) {}

  DEVICE void run() {
    if (thread_index() == 0) init();
    kCluster > 1 ? cluster_sync() : block_sync();
    const int group = warpgroup_index();
    if (group == 0) {
      fewer_registers<kCopierRegisters>();
      if (thread_index() == 0) produce();
      leave();
    } else {
      more_registers<kConsumerRegisters>();
      consume(group - 1);
      leave();  // not behind both: ptxas gives each branch its own registers only where it ends
    }
  }

 private:
  static constexpr int kConsuming = 128 * Shape::kConsumers;  // threads
  enum Named { kTurn = 1, kZeroed = kTurn + Shape::kConsumers };  // 0 is the whole block's

  // The other block of a cluster may yet arrive at barriers of this one.
  DEVICE void leave() {
    if (kCluster > 1) cluster_sync();
  }

  DEVICE void init() {
    const int warps = Shape::kConsumers * kWarps;
    barrier_init(&m_.q_full, 1);
    barrier_init(&m_.q_empty, warps);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&m_.k_full[stage], 1);
      barrier_init(&m_.k_empty[stage], warps * kCluster);
      barrier_init(&m_.v_full[stage], 1);
      barrier_init(&m_.v_empty[stage], warps * kCluster);
    }
    fence_barriers();
  }

  // Step n of a ring of stages: which one, and the parity of its barriers' phase.
  DEVICE static int stage_of(uint32_t step) { return step % kStages; }
  DEVICE static int parity_of(uint32_t step) { return step / kStages % 2; }

  // The tile that this block computes in its round `index`; in a cluster the second block's may lie behind the run.
  DEVICE Tile tile(int round) const {
    const int index = round * (block_count() / kCluster) + block_index() / kCluster;
    Tile tile = tile_at(p_.runs, p_.sizes.heads, kQueries * kCluster, index);
    tile.first += rank() * kQueries;
    return tile;
  }

  DEVICE static int rank() { return block_index() % kCluster; }  // in its cluster

  // -- the producer ----------------------------------------------------------------------------------------------------

  DEVICE void produce() {
    prefetch(&q_), prefetch(&k_), prefetch(&v_);
    uint32_t step = 0;
    int parity = 0;
    for (int round = 0;; ++round) {
      const Tile tile = this->tile(round);
      if (tile.run < 0) return;
      const int kv_head = tile.head / (p_.sizes.heads / p_.sizes.kv_heads);
      KeyTiles keys(p_.runs, tile.run, kKeys);
      for (bool first = true; keys.more(); keys.next(), ++step, first = false) {
        const int stage = stage_of(step);
        copy_stage(m_.k[stage], k_, &m_.k_full[stage], &m_.k_empty[stage], step, kv_head, keys);
        if (first) {  // the keys behind which it comes were free before it was
          barrier_wait(&m_.q_empty, parity ^ 1);
          barrier_expect(&m_.q_full, sizeof m_.q);
          for (int span = 0; span < D / kSpan; ++span) {
            copy_box(m_.q + span * kQueries * kRowBytes, &q_, &m_.q_full, span * kSpan, tile.head, tile.first);
          }
          parity ^= 1;
        }
        copy_stage(m_.v[stage], v_, &m_.v_full[stage], &m_.v_empty[stage], step, kv_head, keys);
      }
    }
  }

  DEVICE void copy_stage(uint8_t* to, const TensorMap& map, uint64_t* full, uint64_t* empty, uint32_t step, int head,
                         const KeyTiles& keys) {
    barrier_wait(empty, parity_of(step) ^ 1);
    barrier_expect(full, kKeys * D * 2);
    const int row = rank() * kCopied;
    for (int span = 0; span < D / kSpan; ++span) {
      uint8_t* there = to + (span * kKeys + row) * kRowBytes;
      if (kCluster > 1)
        copy_box(there, &map, full, span * kSpan, head, keys.first() + row, (1 << kCluster) - 1);
      else
        copy_box(there, &map, full, span * kSpan, head, keys.first() + row);
    }
  }

  // -- the consumers ---------------------------------------------------------------------------------------------------

  DEVICE void consume(int group) {
    uint32_t step = 0;
    int parity = 0;
    if (group == 1) pass_turn(group);  // the first turn is group 0's
    for (int round = 0;; ++round) {
      const Tile tile = this->tile(round);
      if (tile.run < 0) return;
      KeyTiles keys(p_.runs, tile.run, kKeys);
      float out[D / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] = 0.f;
      if (keys.more()) {
        float scores[kKeys / 2], shrink[2];
        uint32_t weights[kKeys / 16][4];
        barrier_wait(&m_.q_full, parity);
        start_scores(scores, group, step);
        products_wait<0>();
        settle(scores);
        release(&m_.k_empty[stage_of(step)]);
        int count = keys.count();
        exponentiate(scores, count, top, sum, shrink);
        pack(weights, scores);
        for (keys.next(); keys.more(); keys.next()) {  // here `step` is that of the weights, one behind the scores'
          named_sync(kTurn + group, kConsuming);
          start_scores(scores, group, step + 1);
          start_sum(out, weights, count, group, step);
          pass_turn(group);
          products_wait<1>();
          settle(scores);
          release(&m_.k_empty[stage_of(step + 1)]);
          count = keys.count();
          exponentiate(scores, count, top, sum, shrink);
          finish_before(sum[0] + sum[1]);
          products_wait<0>();
          settle(out);
          release(&m_.v_empty[stage_of(step)]);
          ++step;
#pragma unroll
          for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i / 2 % 2];
          pack(weights, scores);
        }
        if (thread_index() % 32 == 0) barrier_arrive(&m_.q_empty);
        parity ^= 1;
        start_sum(out, weights, count, group, step);
        products_wait<0>();
        settle(out);
        release(&m_.v_empty[stage_of(step)]);
        ++step;
      }
      write(tile, group, out, top, sum);
    }
  }

  DEVICE void pass_turn(int group) { named_arrive(kTurn + 1 - group, kConsuming); }

  DEVICE void start_scores(float (&scores)[kKeys / 2], int group, uint32_t step) {
    const int stage = stage_of(step);
    barrier_wait(&m_.k_full[stage], parity_of(step));
    const uint64_t q = by_channels(shared_address(m_.q), group * 64), k = by_channels(shared_address(m_.k[stage]), 0);
    products_begin();
#pragma unroll
    for (int channel = 0; channel < D; channel += 16) {
      Product<T, kKeys>::mma(scores, at_channel(q, kQueries, channel), at_channel(k, kKeys, channel), channel > 0);
    }
    products_commit();
  }

  DEVICE void start_sum(float (&out)[D / 2], uint32_t (&weights)[kKeys / 16][4], int count, int group, uint32_t step) {
    const int stage = stage_of(step);
    barrier_wait(&m_.v_full[stage], parity_of(step));
    if (count < kKeys) zero_values(stage, count, group);
    const uint64_t v = by_rows(shared_address(m_.v[stage]), kKeys);
    settle(weights);
    products_begin();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) Product<T, D>::mma(out, weights[i], at_row(v, 16 * i));
    products_commit();
  }

  // Every warp says so for itself, to all blocks that copy here.
  DEVICE void release(uint64_t* empty) {
    const int lane = thread_index() % 32;
    if (kCluster > 1) {
      if (lane < kCluster) barrier_arrive(empty, lane);
    } else {
      if (lane == 0) barrier_arrive(empty);
    }
  }

  // Scores of `count` keys become weights e^(scale · score − scale · top); what was summed under an older `top` has to
  // be multiplied by `shrink`. Of the two rows that a thread has a part of.
  DEVICE void exponentiate(float (&scores)[kKeys / 2], int count, float (&top)[2], float (&sum)[2],
                           float (&shrink)[2]) {
    if (count < kKeys) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (column_of(thread_index(), i) >= count) scores[i] = -INFINITY;
      }
    }
    const float slope = p_.sizes.scale * 1.44269504088896340736f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found = top[half];
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) found = fmaxf(found, fmaxf(scores[i], scores[i + 1]));
      found = fmaxf(found, exchange(found, 1));
      found = fmaxf(found, exchange(found, 2));
      // A score's product is exact and `base` is rounded, so weights share a factor that cancels but must not overflow.
      // Past 2²⁴, where scores that are rounded sums are known to no closer, a power of two rounds nothing.
      const float scale = fabsf(found) * slope < 16777216.f ? slope : power_of_two_in(slope);
      const float base = found == -INFINITY ? 0.f : rounded_product(found, scale);  // −∞ − −∞ would be NaN
      shrink[half] = exp2_fast(rounded_product(top[half], scale) - base);  // 1 where the maximum stays, step by step
      top[half] = found;
      float added = 0.f;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
        scores[i] = exp2_fast(scores[i] * scale - base);
        scores[i + 1] = exp2_fast(scores[i + 1] * scale - base);
        added += scores[i] + scores[i + 1];
      }
      sum[half] = sum[half] * shrink[half] + added;
    }
  }

  // What a thread holds of a product is what it has to hold of the next one's first factor.
  DEVICE static void pack(uint32_t (&weights)[kKeys / 16][4], const float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = packed(T{}, scores[2 * i], scores[2 * i + 1]);
  }

  DEVICE void zero_values(int stage, int count, int group) {
    constexpr int kPieces = D / kChannels;
    for (int i = thread_index_anew() % 128; i < (kKeys - count) * kPieces; i += 128) {
      store_zeros(m_.v[stage] + swizzled(kKeys, count + i / kPieces, i % kPieces * kChannels));
    }
    fence_async();
    named_sync(kZeroed + group, 128);
  }

  DEVICE void write(const Tile& tile, int group, const float (&out)[D / 2], const float (&top)[2],
                    const float (&sum)[2]) {
    const int thread = thread_index() % 128, end = p_.runs.data[tile.run * p_.runs.width + 1];
    float total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = sum[half] + exchange(sum[half], 1);
      total[half] += exchange(total[half], 2);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = tile.first + group * 64 + row_of(thread, 2 * half);
      if (query >= end) continue;
      const bool blind = total[half] == 0.f;
      const float inverse = blind ? 0.f : 1.f / total[half];
      T* to = static_cast<T*>(p_.out.data) + query * p_.out.row + tile.head * p_.out.head;
#pragma unroll
      for (int i = 2 * half; i < D / 2; i += 4) {
        *reinterpret_cast<uint32_t*>(to + column_of(thread, i)) = packed(T{}, out[i] * inverse, out[i + 1] * inverse);
      }
      if (thread % 4 == 0) {
        p_.lse[tile.head * p_.sizes.q_rows + query] =
            blind ? -INFINITY : top[half] * p_.sizes.scale + logf(total[half]);
      }
    }
  }

  Memory& m_;
  const AttentionForward& p_;
  const TensorMap &q_, &k_, &v_;
};

}  // namespace lct::sm90
