// Thin wrappers of the Hopper instructions: barriers in shared memory, bulk tensor copies, warpgroup products.
// tests/emulator/sm90_emulated.h has functions of the same names that do the same on a CPU.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common.cuh"

#define DEVICE __device__ __forceinline__

namespace lct::sm90 {

using TensorMap = CUtensorMap;

// -- where a thread is -------------------------------------------------------------------------------------------------

DEVICE int thread_index() { return int(threadIdx.x); }

// Asked for again each time: what follows from it takes no registers elsewhere. The compiler is told what it could not
// know of it, or each division by a power of two would first ask for the sign.
DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index & 1023;
}

// The same in all threads of a warp, as the compiler then knows.
DEVICE int warpgroup_index() { return __shfl_sync(~0u, int(threadIdx.x) / 128, 0); }

DEVICE int block_index() { return int(blockIdx.x); }

DEVICE int block_count() { return int(gridDim.x); }

// The kernel's shared memory is addressed as 32-bit numbers by all that follows.
DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// -- barriers ----------------------------------------------------------------------------------------------------------

constexpr uint32_t kMostTries = 1u << 28;

DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Arrives, and keeps the phase open until so many bytes have been copied.
DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the barrier that lies at the same place in a block of the cluster.
DEVICE void barrier_arrive(uint64_t* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

// Until the phase of this parity is over; the phase before a barrier's first counts as one of parity 1. A wait without end
// here (not at named or cluster barriers) ends the kernel after so many tries, which takes seconds or, where the hardware
// lets each sleep, far longer.
DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done, late;\n.reg .b32 tries;\nmov.b32 tries, 0;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\n"
      "add.u32 tries, tries, 1;\nsetp.gt.u32 late, tries, %2;\n@late trap;\nbra again;\nover:\n}\n" ::"r"(
          shared_address(barrier)),
      "r"(parity), "n"(kMostTries)
      : "memory");
}

DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void block_sync() { __syncthreads(); }

DEVICE void cluster_sync() {
  __syncwarp();  // lanes may come from different roads, and "aligned" means that they do not
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Named barriers of `threads` threads: `sync` waits for all, `arrive` does not.
DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// -- shared memory -----------------------------------------------------------------------------------------------------

DEVICE void store_zeros(uint8_t* to) { *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0}; }

// What this thread stored to shared memory becomes visible to copies and products.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box of a tensor map at (channel, head, row); rows outside the tensor are zero.
DEVICE void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int channel, int head, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(head), "r"(row)
      : "memory");
}

// The same to the same place in every block of the cluster that `blocks` has a bit for, each with its own barrier.
DEVICE void copy_box(void* to, const TensorMap* map, uint64_t* barrier, int channel, int head, int row, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(head), "r"(row), "h"(uint16_t(blocks))
      : "memory");
}

DEVICE void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// -- registers ---------------------------------------------------------------------------------------------------------

template <int kCount>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

DEVICE float exchange(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

// Rounded for itself: the compiler would make one operation of it and a difference, which then differs from 0 where two
// equal products are subtracted.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// The largest that is not above x, of a normal x > 0.
DEVICE float power_of_two_in(float x) { return __uint_as_float(__float_as_uint(x) & 0xff800000u); }

// 2ˣ, with subnormal results as 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE uint32_t packed(BFloat, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

DEVICE uint32_t packed(Half, float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// -- products ----------------------------------------------------------------------------------------------------------

// Before a first product, and where a thread wrote registers that products read.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kLeft of the groups committed last are not done; what the others gave may be read after `settle`.
template <int kLeft>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The compiler knows nothing of products under way: no use of what they gave may move above this line, and nothing that
// makes their first factors below it.
template <int kCount>
DEVICE void settle(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int kCount>
DEVICE void settle(uint32_t (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// ptxas moves arithmetic behind a wait that stands after it, where nothing of it is needed before: x, a sum of what is
// not negative, is. A vote, because a branch that threads may take apart costs the registers that a warp shares.
DEVICE void finish_before(float x) {
  if (__any_sync(~0u, x < 0.f)) asm volatile("trap;");
}

// d [64, N] += a b over 16 columns of a. A thread holds N / 2 elements of d (see `row_of`, `column_of`).
//   mma(d, a, b, add)   a [64, 16] and b [N, 16] in shared memory, both with their columns contiguous
//   mma(d, a, b)        a [64, 16] in registers, b [16, N] in shared memory with its rows contiguous; always adds
template <class T, int N>
struct Product;

#define R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define REGISTERS_32                                                                            \
  R8(0, 1, 2, 3, 4, 5, 6, 7) "," R8(8, 9, 10, 11, 12, 13, 14, 15) "," R8(16, 17, 18, 19, 20, 21, 22, 23) "," \
  R8(24, 25, 26, 27, 28, 29, 30, 31)
#define REGISTERS_64                                                                                           \
  REGISTERS_32 "," R8(32, 33, 34, 35, 36, 37, 38, 39) "," R8(40, 41, 42, 43, 44, 45, 46, 47) ","               \
  R8(48, 49, 50, 51, 52, 53, 54, 55) "," R8(56, 57, 58, 59, 60, 61, 62, 63)
#define REGISTERS_88 \
  REGISTERS_64 "," R8(64, 65, 66, 67, 68, 69, 70, 71) "," R8(72, 73, 74, 75, 76, 77, 78, 79) "," \
  R8(80, 81, 82, 83, 84, 85, 86, 87)
#define D8(i)                                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define OUTPUTS_32 D8(0), D8(8), D8(16), D8(24)
#define OUTPUTS_64 OUTPUTS_32, D8(32), D8(40), D8(48), D8(56)
#define OUTPUTS_88 OUTPUTS_64, D8(64), D8(72), D8(80)

// COUNT = N / 2; the numbers behind it are those of the operands that follow the outputs.
#define PRODUCT(T, TYPE, N, COUNT, O0, O1, O2, O3, O4)                                                             \
  template <>                                                                                                      \
  struct Product<T, N> {                                                                                           \
    static DEVICE void mma(float (&d)[COUNT], uint64_t a, uint64_t b, bool add) {                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N          \
                   "k16.f32." TYPE "." TYPE " {" REGISTERS_##COUNT "}, %" #O0 ", %" #O1 ", p, 1, 1, 0, 0;\n}\n"     \
                   : OUTPUTS_##COUNT                                                                               \
                   : "l"(a), "l"(b), "r"(int(add)));                                                               \
    }                                                                                                              \
    static DEVICE void mma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                \
                   "k16.f32." TYPE "." TYPE " {" REGISTERS_##COUNT "}, {%" #O0 ", %" #O1 ", %" #O2 ", %" #O3          \
                   "}, %" #O4 ", p, 1, 1, 1;\n}\n"                                                                  \
                   : OUTPUTS_##COUNT                                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }                                                                                                              \
  };
#define PRODUCTS(T, TYPE)                          \
  PRODUCT(T, TYPE, 64, 32, 32, 33, 34, 35, 36)     \
  PRODUCT(T, TYPE, 128, 64, 64, 65, 66, 67, 68)    \
  PRODUCT(T, TYPE, 176, 88, 88, 89, 90, 91, 92)
PRODUCTS(BFloat, "bf16")
PRODUCTS(Half, "f16")

#undef PRODUCTS
#undef PRODUCT
#undef OUTPUTS_88
#undef OUTPUTS_64
#undef OUTPUTS_32
#undef D8
#undef REGISTERS_88
#undef REGISTERS_64
#undef REGISTERS_32
#undef R8

}  // namespace lct::sm90
