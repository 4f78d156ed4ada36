// The functions of csrc/sm90.cuh on the machine of machine.h: a kernel that includes them runs on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "machine.h"

#define DEVICE inline

namespace lct::sm90 {

using ::fmaxf;
using ::logf;

// [rows, heads, channels] of 16-bit numbers; a box has `box` rows of one head and 64 channels.
struct TensorMap {
  const uint16_t* data;
  int64_t rows, heads, channels, row_stride, head_stride;
  int box;
};

// -- where a thread is -------------------------------------------------------------------------------------------------

inline int thread_index() { return emulated::self().index; }
inline int thread_index_anew() { return thread_index(); }
inline int warpgroup_index() { return thread_index() / 128; }
inline int block_index() { return emulated::self().block->index; }
inline int block_count() { return emulated::now().blocks(); }
inline uint32_t shared_address(const void* pointer) { return emulated::address_of(pointer); }

// -- barriers ----------------------------------------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (arrivals < 1 || arrivals > 255) emulated::fail("a barrier of so many arrivals");
  emulated::Barrier fresh{};
  fresh.arrivals = arrivals;
  fresh.expected = uint8_t(arrivals);
  fresh.magic = 0xba;
  memcpy(barrier, &fresh, 8);
}

inline void barrier_expect(uint64_t* barrier, int bytes) {
  auto& m = emulated::now();
  auto& block = *emulated::self().block;
  m.barrier(block, shared_address(barrier)).bytes += bytes;
  m.arrive(block, shared_address(barrier));
}

inline void barrier_arrive(uint64_t* barrier) {
  emulated::now().arrive(*emulated::self().block, shared_address(barrier));
  emulated::now().pause();
}

inline void barrier_arrive(uint64_t* barrier, int block) {
  emulated::now().arrive(*emulated::self().block->cluster.at(block), shared_address(barrier));
  emulated::now().pause();
}

inline void barrier_wait(uint64_t* barrier, int parity) {
  auto& m = emulated::now();
  auto& block = *emulated::self().block;
  const uint32_t address = shared_address(barrier);
  m.wait("a barrier", [&m, &block, address, parity] { return m.barrier(block, address).parity != parity; });
}

inline void fence_barriers() {}

inline void block_sync() {
  auto& block = *emulated::self().block;
  emulated::now().meet("the block", block.named[16], int(block.threads.size()), true);
}

inline void cluster_sync() {
  auto& block = *emulated::self().block;
  emulated::now().meet("the cluster", *block.cluster_barrier, int(block.threads.size() * block.cluster.size()), true);
}

inline void named_sync(int id, int threads) {
  emulated::now().meet("a named barrier", emulated::self().block->named[id], threads, true);
}

inline void named_arrive(int id, int threads) {
  emulated::now().meet("a named barrier", emulated::self().block->named[id], threads, false);
}

// -- shared memory -----------------------------------------------------------------------------------------------------

inline void store_bytes(void* to, const void* from, int bytes) {
  auto& t = emulated::self();
  const uint32_t address = shared_address(to);
  memcpy(emulated::now().at(*t.block, address, bytes), from, bytes);
  const uint32_t piece = (address - emulated::kBase) / 16;
  t.block->unfenced[piece] += 1;
  t.stored.push_back(piece);
}

inline void store_zeros(uint8_t* to) {
  const uint32_t zeros[4] = {};
  store_bytes(to, zeros, 16);
}

inline void fence_async() {
  auto& t = emulated::self();
  for (uint32_t piece : t.stored) t.block->unfenced[piece] -= 1;
  t.stored.clear();
}

inline void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int channel, int head, int row, int blocks) {
  auto& m = emulated::now();
  auto& block = *emulated::self().block;
  const uint32_t there = shared_address(to), full = shared_address(barrier);
  if (there % 128) emulated::fail("a copy to an address that is no multiple of 128");
  for (size_t i = 0; i < block.cluster.size(); ++i) {
    if (!(blocks >> i & 1)) continue;
    emulated::Block& target = *block.cluster[i];
    m.start([=, &m, &target] {
      for (int r = 0; r < map->box; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r >= 0 && row + r < map->rows && head < map->heads && channel + c < map->channels;
          const uint16_t bits =
              inside ? map->data[(row + r) * map->row_stride + head * map->head_stride + channel + c] : uint16_t(0);
          uint32_t address = there + r * 128 + c * 2;
          address ^= (address >> 7 & 7) << 4;
          memcpy(m.fenced(target, address, 2), &bits, 2);
        }
      m.arrived(target, full, map->box * 128);
    });
  }
}

inline void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int channel, int head, int row) {
  copy_box(to, map, barrier, channel, head, row, 1 << emulated::self().block->rank);
}

inline void prefetch(const TensorMap*) {}

// -- registers ---------------------------------------------------------------------------------------------------------

template <int kCount>
inline void set_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "");
  auto& t = emulated::self();
  const int more = kCount - t.registers;
  emulated::now().wait("registers", [&t, more] { return t.block->registers >= more; });
  t.block->registers -= more;
  t.registers = kCount;
}

template <int kCount>
inline void more_registers() {
  set_registers<kCount>();
}

template <int kCount>
inline void fewer_registers() {
  set_registers<kCount>();
}

inline float exchange(float x, int lanes) {
  auto& t = emulated::self();
  auto& warp = t.block->warps[t.index / 32];
  auto& slots = warp.exchanged[warp.round % 2];
  slots[t.index % 32] = x;
  emulated::now().gather("a shuffle");
  return slots[t.index % 32 ^ lanes];
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline float rounded_product(float a, float b) {
  volatile float product = a * b;
  return product;
}

inline float power_of_two_in(float x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.f, exponent - 1);
}

template <class T>
uint32_t packed(T, float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

// -- products ----------------------------------------------------------------------------------------------------------

inline void products_begin() {}

inline void products_commit() {
  auto& t = emulated::self();
  t.groups.emplace_back();
  t.in_flight += 1;
  const int warp = t.index / 32;
  emulated::now().gather("a commit", [block = t.block, warp] {
    if (emulated::now().eager()) emulated::now().compute(*block, warp, 0);
  });
}

template <int kLeft>
inline void products_wait() {
  auto& t = emulated::self();
  const int warp = t.index / 32;
  emulated::now().gather("products", [block = t.block, warp] {
    emulated::now().pause();
    emulated::now().compute(*block, warp, kLeft);
  });
}

template <class X>
inline void settle(X&) {}

inline void finish_before(float x) {
  if (x < 0.f) emulated::fail("what stands before a wait is negative");
}

template <class T>
constexpr bool kIsBFloat = false;
template <>
constexpr bool kIsBFloat<BFloat> = true;

template <class T, int N>
struct Product {
  static void mma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    emulated::self().groups.back().push_back({d, N, nullptr, a, b, add, kIsBFloat<T>});
  }
  static void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    emulated::self().groups.back().push_back({d, N, a, 0, b, true, kIsBFloat<T>});
  }
};

}  // namespace lct::sm90
