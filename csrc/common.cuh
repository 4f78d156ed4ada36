// What a kernel's body needs to run on a GPU and, lane by lane, on the CPU: dtypes, vectors of eight channels, teams.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace lct {

constexpr int kChannels = 8;   // of a lane: 16 bytes of a half type, 32 of fp32
constexpr int kMaxLanes = 32;  // of a team; a warp at most, so that it can shuffle
constexpr int kThreads = 128;  // of a block; the kernels need up to 96 registers each

// -- dtypes -----------------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

HD float widen(float x) { return x; }

HD float widen(BFloat x) { return float_of(uint32_t(x.bits) << 16); }

HD float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // The exponent is moved by a product, which also makes subnormals right where the mantissa has no hidden bit.
  const uint32_t shifted = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  const uint32_t size = special ? shifted | 0x7f800000 : bits_of(float_of(shifted) * 0x1p112f);
  return float_of(sign | size);
#endif
}

// Round to nearest, ties to even, as torch does; any NaN becomes torch's.
template <class T>
HD T narrow(float x);

template <>
HD float narrow<float>(float x) {
  return x;
}

template <>
HD BFloat narrow<BFloat>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
#endif
}

template <>
HD Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and beyond round to infinity
  // Below 2^-14 the FPU rounds: to a sum with 0.5, whose last bit is the smallest half.
  if (size < 0x38800000) return {uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13))};
#endif
}

// -- eight channels ---------------------------------------------------------------------------------------------------

struct Eight {
  float x[kChannels];
};

template <class T>
struct alignas(16) Packed {
  T x[kChannels];
};

// A GPU reads 16 bytes at once and past its L1's coherence: nothing that a kernel reads does it write.
template <class T>
HD Packed<T> load(const T* from) {
  Packed<T> out;
#ifdef __CUDA_ARCH__
  for (int i = 0; i < int(sizeof(out) / 16); ++i)
    reinterpret_cast<uint4*>(&out)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
#else
  memcpy(&out, from, sizeof out);
#endif
  return out;
}

template <class T>
HD void store(T* to, const Packed<T>& from) {
#ifdef __CUDA_ARCH__
  for (int i = 0; i < int(sizeof(from) / 16); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&from)[i];
#else
  memcpy(to, &from, sizeof from);
#endif
}

template <class T>
HD Eight unpack(const Packed<T>& from) {
  Eight out;
  for (int i = 0; i < kChannels; ++i) out.x[i] = widen(from.x[i]);
  return out;
}

template <class T>
HD Packed<T> pack(const Eight& from) {
  Packed<T> out;
  for (int i = 0; i < kChannels; ++i) out.x[i] = narrow<T>(from.x[i]);
  return out;
}

// -- teams ------------------------------------------------------------------------------------------------------------

// The lanes that share one head of one row; `used` of `lanes`, a power of two, have channels. A block: kThreads lanes.
//
//   Lane<X> x;                             an X of every lane: x[lane]
//   team.each([&](int lane) {…});          every used lane
//   team.sum([&](int lane) {return …;})    over the used lanes, always in the same tree
//   team.add_up(to, dim, part)             to[channel] = Σ part over the teams of a block, in order; all must call it

#ifdef __CUDACC__
class DeviceTeam {
 public:
  template <class X>
  struct Lane {
    X x;
    HD X& operator[](int) { return x; }
    HD const X& operator[](int) const { return x; }
  };

  __device__ DeviceTeam(int lanes, int used) : lanes_(lanes), used_(used), lane_(threadIdx.x & (lanes - 1)) {}

  HD int index() const {
#ifdef __CUDA_ARCH__
    return threadIdx.x / lanes_;
#else
    return 0;
#endif
  }

  template <class F>
  HD void each(F f) const {
    if (lane_ < used_) f(lane_);
  }

  template <class F>
  HD float sum(F f) const {
    float total = lane_ < used_ ? f(lane_) : 0.0f;
#ifdef __CUDA_ARCH__
    // Other teams of the warp may be elsewhere, or gone.
    const unsigned mine = (0xffffffffu >> (32 - lanes_)) << (threadIdx.x & 31 & ~(lanes_ - 1));
    for (int offset = lanes_ / 2; offset; offset /= 2) total += __shfl_xor_sync(mine, total, offset);
#endif
    return total;
  }

  HD void add_up(float* to, int dim, const Lane<Eight>& part) const {
#ifdef __CUDA_ARCH__
    __shared__ Eight parts[kThreads];
    __syncthreads();  // another sum may still be read
    parts[threadIdx.x] = part.x;
    __syncthreads();
    for (int channel = threadIdx.x; channel < dim; channel += kThreads) {
      float total = 0;
      for (int first = 0; first < kThreads; first += lanes_)
        total += parts[first + channel / kChannels].x[channel % kChannels];
      to[channel] = total;
    }
#endif
  }

 private:
  int lanes_, used_, lane_;
};

// Null, or what went wrong with the launch before.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Makes the tensors' own GPU current, whichever is, for as long as it lives; false where that fails, see `launch_error`.
class OnDevice {
 public:
  explicit OnDevice(int device)
      : switched_(cudaGetDevice(&before_) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) {}
  ~OnDevice() {
    if (switched_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  explicit operator bool() const { return switched_; }

 private:
  int before_;
  bool switched_;
};
#endif

// Its lanes one after the other. The teams of a block run in order too, so each adds to what the one before has left.
class HostTeam {
 public:
  template <class X>
  struct Lane {
    X x[kMaxLanes];
    X& operator[](int lane) { return x[lane]; }
    const X& operator[](int lane) const { return x[lane]; }
  };

  HostTeam(int lanes, int used, int index) : lanes_(lanes), used_(used), index_(index) {}

  int index() const { return index_; }

  template <class F>
  void each(F f) const {
    for (int lane = 0; lane < used_; ++lane) f(lane);
  }

  template <class F>
  float sum(F f) const {
    float totals[kMaxLanes];
    for (int lane = 0; lane < lanes_; ++lane) totals[lane] = lane < used_ ? f(lane) : 0;
    for (int offset = lanes_ / 2; offset; offset /= 2)
      for (int lane = 0; lane < offset; ++lane) totals[lane] += totals[lane + offset];
    return totals[0];
  }

  void add_up(float* to, int, const Lane<Eight>& part) const {
    each([&](int lane) {
      for (int i = 0; i < kChannels; ++i) {
        float& total = to[lane * kChannels + i];
        total = index_ ? total + part[lane].x[i] : part[lane].x[i];
      }
    });
  }

 private:
  int lanes_, used_, index_;
};

}  // namespace lct
