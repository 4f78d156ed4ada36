// Attention forward on Hopper, hand-written: one producer warp copies tiles of keys and values, two warpgroups of 64
// queries each compute. Persistent blocks; see attention_sm90.h for the order of tiles and the places in shared memory.
#include <cuda.h>

#include "attention_sm90.h"
#include "sm90.cuh"

namespace lct::sm90 {
namespace {

constexpr int kStages = 2;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = 128 * (1 + kConsumers);

struct ForwardParams {
  const int32_t* table;  // the plan's, on the device
  int runs, width;       // rows and columns of the table
  int heads, kv_heads;
  int queries;  // S
  int64_t tiles;
  void* out;   // [S, A, D]
  float* lse;  // [A, S]
  float scale;
};

template <int D>
struct alignas(1024) Shared {
  uint8_t q[kQueries * D * 2];
  uint8_t k[kStages][kKeys * D * 2];
  uint8_t v[kStages][kKeys * D * 2];
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Where a ring stands: a stage, and the parity of the phase that its barrier is in.
struct Ring {
  int stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

template <int D>
__device__ void copy_rows(uint8_t* to, const CUtensorMap* map, uint64_t* barrier, int head, int row) {
#pragma unroll
  for (int span = 0; span < D / 64; ++span) {
    copy_box(to + span * kKeys * kRowBytes, map, barrier, span * 64, head, row);
  }
}

template <int D>
__device__ void produce(Shared<D>& s, const ForwardParams& p, const CUtensorMap* q, const CUtensorMap* k,
                        const CUtensorMap* v) {
  constexpr int kTileBytes = kKeys * D * 2;
  Ring ring;
  int q_phase = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = tile_at(p.table, p.runs, p.width, p.heads, index);
    const Run run{p.table + int64_t(tile.run) * p.width};
    const int kv_head = tile.head / (p.heads / p.kv_heads);
    barrier_wait(&s.q_empty, q_phase ^ 1);
    barrier_expect(&s.q_full, kQueries * D * 2);
    copy_rows<D>(s.q, q, &s.q_full, tile.head, tile.query);
    q_phase ^= 1;
    for (int i = 0; 2 + 2 * i < p.width; ++i) {
      for (int key = run.first(i); key < run.last(i); key += kKeys) {
        barrier_wait(&s.k_empty[ring.stage], ring.phase ^ 1);
        barrier_expect(&s.k_full[ring.stage], kTileBytes);
        copy_rows<D>(s.k[ring.stage], k, &s.k_full[ring.stage], kv_head, key);
        barrier_wait(&s.v_empty[ring.stage], ring.phase ^ 1);
        barrier_expect(&s.v_full[ring.stage], kTileBytes);
        copy_rows<D>(s.v[ring.stage], v, &s.v_full[ring.stage], kv_head, key);
        ring.next();
      }
    }
  }
}

template <class T, int D>
__device__ void consume(Shared<D>& s, const ForwardParams& p, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // of the 64 of this warpgroup, and row + 8
  const float scale = p.scale * 1.44269504088896340736f;
  Ring ring;
  int q_phase = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = tile_at(p.table, p.runs, p.width, p.heads, index);
    const Run run{p.table + int64_t(tile.run) * p.width};
    float out[D / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.f;
    barrier_wait(&s.q_full, q_phase);
    const uint32_t q = shared_address(s.q) + group * 64 * kRowBytes;
    for (int i = 0; 2 + 2 * i < p.width; ++i) {
      for (int key = run.first(i); key < run.last(i); key += kKeys) {
        const int left = run.last(i) - key;  // keys of this tile that are seen
        float scores[kKeys / 2];
        barrier_wait(&s.k_full[ring.stage], ring.phase);
        const uint32_t k = shared_address(s.k[ring.stage]);
        products_begin();
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
          const uint32_t offset = c / 4 * kKeys * kRowBytes + c % 4 * 32;
          Product<T>::mma(scores, descriptor(q + offset, 0, 1024), descriptor(k + offset, 0, 1024), c > 0);
        }
        products_commit();
        products_wait<0>();
        if (thread == 0) barrier_arrive(&s.k_empty[ring.stage]);
        if (left < kKeys) {
#pragma unroll
          for (int j = 0; j < kKeys / 2; ++j) {
            if (j / 4 * 8 + lane % 4 * 2 + j % 2 >= left) scores[j] = -INFINITY;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = largest[half];
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
            top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
          }
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          // scores of −inf throughout would give NaN: exponents are taken from 0 there
          const float base = top == -INFINITY ? 0.f : top * scale;
          const float shrink = exp2f(largest[half] * scale - base);
          float added = 0.f;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& x = scores[4 * j + 2 * half + c];
              x = exp2f(x * scale - base);
              added += x;
            }
          }
          largest[half] = top;
          sum[half] = sum[half] * shrink + added;
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            out[4 * j + 2 * half] *= shrink;
            out[4 * j + 2 * half + 1] *= shrink;
          }
        }
        barrier_wait(&s.v_full[ring.stage], ring.phase);
        if (left < kKeys) {  // values that nobody sees may be anything, and zero times anything is not always zero
          for (int i = thread; i < (kKeys - left) * D / 8; i += 128) {
            const int r = left + i / (D / 8), channel = i % (D / 8) * 8;
            *reinterpret_cast<uint4*>(s.v[ring.stage] + swizzled(r, channel, kKeys)) = uint4{0, 0, 0, 0};
          }
          fence_async();
          warpgroup_sync(1 + group);
        }
        uint32_t weights[kKeys / 16][4];
#pragma unroll
        for (int c = 0; c < kKeys / 16; ++c) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            const float* x = &scores[8 * c + 4 * (part / 2) + 2 * (part % 2)];
            weights[c][part] = packed(T{}, x[0], x[1]);
          }
        }
        const uint32_t v = shared_address(s.v[ring.stage]);
        products_begin();
#pragma unroll
        for (int c = 0; c < kKeys / 16; ++c) {
          Product<T>::mma(out, weights[c], descriptor(v + c * 16 * kRowBytes, kKeys * kRowBytes, 1024), 1);
        }
        products_commit();
        products_wait<0>();
        if (thread == 0) barrier_arrive(&s.v_empty[ring.stage]);
        ring.next();
      }
    }
    if (thread == 0) barrier_arrive(&s.q_empty);
    q_phase ^= 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int query = tile.query + group * 64 + row + 8 * half;
      if (query >= run.end()) continue;
      const float inverse = total > 0.f ? 1.f / total : 0.f;
      auto* to = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + (int64_t(query) * p.heads + tile.head) * D);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        to[j * 4 + lane % 4] = packed(T{}, out[4 * j + 2 * half] * inverse, out[4 * j + 2 * half + 1] * inverse);
      }
      if (lane % 4 == 0) {
        p.lse[int64_t(tile.head) * p.queries + query] =
            total > 0.f ? largest[half] * p.scale + logf(total) : -INFINITY;
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ CUtensorMap q,
                   const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<D>& s = *reinterpret_cast<Shared<D>*>(memory);
  if (threadIdx.x == 0) {
    barrier_init(&s.q_full, 1);
    barrier_init(&s.q_empty, kConsumers);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&s.k_full[stage], 1);
      barrier_init(&s.k_empty[stage], kConsumers);
      barrier_init(&s.v_full[stage], 1);
      barrier_init(&s.v_empty[stage], kConsumers);
    }
    fence_barriers();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) produce<D>(s, p, &q, &k, &v);
  } else {
    more_registers<240>();
    consume<T, D>(s, p, group - 1);
  }
}

// Named, so that all four are compiled.
using Kernel = void (*)(ForwardParams, CUtensorMap, CUtensorMap, CUtensorMap);

}  // namespace

extern const Kernel kForward[2][2];
const Kernel kForward[2][2] = {{forward_kernel<Half, 64>, forward_kernel<Half, 128>},
                               {forward_kernel<BFloat, 64>, forward_kernel<BFloat, 128>}};

}  // namespace lct::sm90
