// One tile of attention, by vectors of the instruction set that this file is compiled for (setup.py compiles it once for
// each). Everything here has internal linkage and nothing comes from the standard library's templates: the linker must
// never take this file's copy of a shared function for a processor that cannot run it.
//
// Rows that a tile owns stand in the lanes of vectors, rows that it looks at are broadcast one by one. So a row's maximum
// and sum are those of a lane, and keys and values are read where they lie, whatever their strides. Every product of
// matrices has one form, C[i][j] (+)= Σ_k A(i, k) · B[k][j] with j in the lanes.
#include <cmath>
#include <cstring>
#include <utility>

#include "attention_cpu.h"

namespace lct {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16, kVectors = 4;  // floats of a vector, and how many of them a block of the product is wide
#elif defined(__AVX2__)
constexpr int W = 8, kVectors = 2;
#else
constexpr int W = 4, kVectors = 2;
#endif
constexpr int kRows = 6;  // rows of a block of the product: 6 · kVectors sums stay in registers

typedef float V __attribute__((vector_size(4 * W), aligned(4 * W), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4 * W), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline V& at(float* x) { return *reinterpret_cast<V*>(x); }
inline const V& at(const float* x) { return *reinterpret_cast<const V*>(x); }
inline V load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(float* x, V v) { *reinterpret_cast<Unaligned*>(x) = v; }
inline V splat(float x) { return x - V{}; }
inline V larger(V a, V b) { return a > b ? a : b; }

int vectors(int n) { return (n + W - 1) / W; }
const float* row_of(const Rows& x, int64_t row, int head) {
  return static_cast<const float*>(x.data) + row * x.row + head * x.head;
}
float* row_of_mutable(const Rows& x, int64_t row, int head) { return const_cast<float*>(row_of(x, row, head)); }

// e^x for x ≤ about 88; 0 below −87, NaN of NaN. A polynomial for 2^f, f in [−½, ½], relative error 2e−7.
inline V exponential(V x) {
  const V t = x * 1.44269504f, shifted = t + 12582912.f;  // the nearest integer, in the low bits
  const V f = t - (shifted - 12582912.f);
  V p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  const I power = reinterpret_cast<const I&>(p) + (reinterpret_cast<const I&>(shifted) << 23);
  return t < -126.f ? V{} : reinterpret_cast<const V&>(power);
}

// -- products ----------------------------------------------------------------------------------------------------------

// Where A(i, k) lies: at a[i · stride + k], or at a[i + k · stride].
enum class A { rows, columns };
// What becomes of C: the sum, C plus the sum, or C times a factor of each lane plus the sum.
enum class C { set, add, scale };

struct Product {
  int k;
  const float* a;
  int64_t a_stride;
  const float* b;  // [k][lanes], aligned
  int64_t b_stride;
  float* c;  // [rows][lanes], aligned
  int64_t c_stride;
  const float* factor;  // of every lane
};

template <int R, int N, A form, C update>
inline void block(const Product& p, int row, int lane) {
  V sum[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = V{};
  const float* a = p.a + (form == A::rows ? row * p.a_stride : row);
  const float* b = p.b + lane;
  for (int k = 0; k < p.k; ++k) {
    V right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) right[j] = at(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V left = splat(form == A::rows ? a[i * p.a_stride] : a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
    a += form == A::rows ? 1 : p.a_stride;
    b += p.b_stride;
  }
  float* c = p.c + row * p.c_stride + lane;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i, c += p.c_stride)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      V& to = at(c + j * W);
      if (update == C::set) to = sum[i][j];
      if (update == C::add) to += sum[i][j];
      if (update == C::scale) to = to * at(p.factor + lane + j * W) + sum[i][j];
    }
}

template <int N, A form, C update>
void columns(const Product& p, int rows, int lane) {
  int row = 0;
  for (; row + kRows <= rows; row += kRows) block<kRows, N, form, update>(p, row, lane);
  switch (rows - row) {
    case 5: return block<5, N, form, update>(p, row, lane);
    case 4: return block<4, N, form, update>(p, row, lane);
    case 3: return block<3, N, form, update>(p, row, lane);
    case 2: return block<2, N, form, update>(p, row, lane);
    case 1: return block<1, N, form, update>(p, row, lane);
  }
}

template <A form, C update>
void multiply(const Product& p, int rows, int vectors) {
  int lane = 0;
  for (; vectors >= kVectors; vectors -= kVectors, lane += kVectors * W) columns<kVectors, form, update>(p, rows, lane);
  if (kVectors > 3 && vectors == 3) columns<3, form, update>(p, rows, lane);
  if (kVectors > 2 && vectors == 2) columns<2, form, update>(p, rows, lane);
  if (vectors == 1) columns<1, form, update>(p, rows, lane);
}

// -- rows into lanes and back ------------------------------------------------------------------------------------------

template <int S, int... J>
inline V low(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
}
template <int S, int... J>
inline V high(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
}

template <int S>
inline void exchange(V (&x)[W]) {
  constexpr std::make_integer_sequence<int, W> lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const V a = x[i], b = x[i + S];
      x[i] = low<S>(a, b, lanes);
      x[i + S] = high<S>(a, b, lanes);
    }
}

inline void transpose(V (&x)[W]) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W > 4) exchange<4 % W>(x);
  if constexpr (W > 8) exchange<8 % W>(x);
}

// W channels from `channel` on; beyond `dim` they are 0.
inline V channels_of(const float* row, int channel, int dim) {
  if (channel + W <= dim) return load(row + channel);
  V part{};
  std::memcpy(&part, row + channel, sizeof(float) * (dim - channel));
  return part;
}

// Rows [count, D] into lanes [D padded, kTile]; lanes without a row are 0 up to the end of their vector.
void into_lanes(const Rows& x, int64_t first, int count, int head, int dim, float scale, float* lanes) {
  for (int row = 0; row < count; row += W)
    for (int channel = 0; channel < dim; channel += W) {
      V square[W];
      for (int i = 0; i < W; ++i)
        square[i] = row + i < count ? channels_of(row_of(x, first + row + i, head), channel, dim) * scale : V{};
      transpose(square);
      for (int i = 0; i < W; ++i) at(lanes + (channel + i) * kTile + row) = square[i];
    }
}

// Lanes [D padded, kTile] times a factor of each into rows [count, D].
void from_lanes(const float* lanes, const float* factor, const Rows& x, int64_t first, int count, int head, int dim) {
  for (int row = 0; row < count; row += W) {
    const V times = factor ? at(factor + row) : splat(1.f);
    for (int channel = 0; channel < dim; channel += W) {
      V square[W];
      for (int i = 0; i < W; ++i) square[i] = at(lanes + (channel + i) * kTile + row) * times;
      transpose(square);
      for (int i = 0; i < W && row + i < count; ++i) {
        float* to = row_of_mutable(x, first + row + i, head) + channel;
        if (channel + W <= dim)
          store(to, square[i]);
        else
          std::memcpy(to, &square[i], sizeof(float) * (dim - channel));
      }
    }
  }
}

// -- forward -----------------------------------------------------------------------------------------------------------

int64_t scratch_floats(int dim) {
  const int64_t padded = vectors(dim) * W, rows = padded * kTile, block = kBlock * kTile;
  const int64_t forward = 2 * rows + block + 3 * kTile, backward = 5 * rows + 2 * block;
  return forward > backward ? forward : backward;
}

// Scores [n, lanes] become e^(score − peak); peak, total and what is left of the earlier sums follow.
void softmax(float* scores, int n, int lanes, float* peak, float* total, float* kept) {
  for (int lane = 0; lane < lanes; lane += W) {
    float* s = scores + lane;
    V a = at(peak + lane), b = at(s);
    int i = 0;
    for (; i + 2 <= n; i += 2) a = larger(a, at(s + i * kTile)), b = larger(b, at(s + (i + 1) * kTile));
    if (i < n) a = larger(a, at(s + i * kTile));
    const V highest = larger(a, b), shrink = exponential(at(peak + lane) - highest);
    V sum{}, more{};
    for (i = 0; i + 2 <= n; i += 2) {
      sum += at(s + i * kTile) = exponential(at(s + i * kTile) - highest);
      more += at(s + (i + 1) * kTile) = exponential(at(s + (i + 1) * kTile) - highest);
    }
    if (i < n) sum += at(s + i * kTile) = exponential(at(s + i * kTile) - highest);
    at(total + lane) = at(total + lane) * shrink + (sum + more);
    at(peak + lane) = highest;
    at(kept + lane) = shrink;
  }
}

void forward(const AttentionForward& p, const int32_t* run, int64_t first, int count, int head, float* scratch) {
  const int dim = p.sizes.dim, columns = vectors(count), padded = vectors(dim) * W;
  const int kv_head = head / (p.sizes.heads / p.sizes.kv_heads);
  float *queries = scratch, *out = queries + padded * kTile, *scores = out + padded * kTile;
  float *peak = scores + kBlock * kTile, *total = peak + kTile, *kept = total + kTile;
  into_lanes(p.q, first, count, head, dim, p.sizes.scale, queries);
  std::memset(out, 0, sizeof(float) * padded * kTile);
  for (int i = 0; i < kTile; ++i) peak[i] = -INFINITY, total[i] = 0;
  for (int interval = 0; interval < p.runs.intervals(); ++interval)
    for (int64_t lo = run[2 + 2 * interval], hi = run[3 + 2 * interval]; lo < hi; lo += kBlock) {
      const int n = int(hi - lo < kBlock ? hi - lo : kBlock);
      const float *keys = row_of(p.k, lo, kv_head), *values = row_of(p.v, lo, kv_head);
      multiply<A::rows, C::set>({dim, keys, p.k.row, queries, kTile, scores, kTile, nullptr}, n, columns);
      softmax(scores, n, columns * W, peak, total, kept);
      multiply<A::columns, C::scale>({n, values, p.v.row, scores, kTile, out, kTile, kept}, dim, columns);
    }
  float* lse = p.lse + head * p.sizes.q_rows + first;
  for (int i = 0; i < count; ++i) lse[i] = peak[i] + std::log(total[i]);
  for (int i = 0; i < columns * W; ++i) total[i] = total[i] > 0 ? 1 / total[i] : total[i];
  from_lanes(out, total, p.out, first, count, head, dim);
}

// -- backward ----------------------------------------------------------------------------------------------------------

void delta(const AttentionBackward& p, int64_t first, int count, int head, float* delta) {
  const int dim = p.sizes.dim;
  for (int i = 0; i < count; ++i) {
    const float *a = row_of(p.dout, first + i, head), *b = row_of(p.out, first + i, head);
    V lanes{};
    int d = 0;
    for (; d + W <= dim; d += W) lanes += load(a + d) * load(b + d);
    float sum = -p.dlse[head * p.sizes.q_rows + first + i];
    for (int j = 0; j < W; ++j) sum += lanes[j];
    for (; d < dim; ++d) sum += a[d] * b[d];
    delta[i] = sum;
  }
}

// Scores and dP [n, lanes] become P and dS = P (dP − δ) scale.
void gradients(float* scores, float* dp, int n, int lanes, const float* lse, const float* delta, float scale) {
  for (int i = 0; i < n; ++i)
    for (int lane = 0; lane < lanes; lane += W) {
      V &s = at(scores + i * kTile + lane), &d = at(dp + i * kTile + lane);
      const V probability = exponential(s - lse[i]);
      s = probability;
      d = probability * (d - delta[i]) * scale;
    }
}

void backward(const AttentionBackward& p, const float* delta, const int32_t* run, int64_t first, int count, int kv_head,
              const PartialDq& dq, float* scratch) {
  const AttentionSizes& z = p.sizes;
  const int dim = z.dim, columns = vectors(count), padded = vectors(dim) * W, group = z.heads / z.kv_heads;
  const int64_t tile = int64_t(padded) * kTile;
  float *keys = scratch, *values = keys + tile, *dk = values + tile, *dv = dk + tile, *rows = dv + tile;
  float *scores = rows + tile, *dp = scores + kBlock * kTile;
  into_lanes(p.k, first, count, kv_head, dim, z.scale, keys);
  into_lanes(p.v, first, count, kv_head, dim, 1.f, values);
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < dim; c += W) at(rows + i * padded + c) = channels_of(row_of(p.k, first + i, kv_head), c, dim);
  std::memset(dk, 0, sizeof(float) * 2 * tile);
  for (int interval = 0; interval < p.key_runs.intervals(); ++interval)
    for (int64_t lo = run[2 + 2 * interval], hi = run[3 + 2 * interval]; lo < hi; lo += kBlock) {
      const int n = int(hi - lo < kBlock ? hi - lo : kBlock);
      for (int g = 0; g < group; ++g) {
        const int head = kv_head * group + g;
        const int64_t at_row = head * z.q_rows + lo;
        const float *q = row_of(p.q, lo, head), *dout = row_of(p.dout, lo, head);
        float* to = dq.data + (g * dq.rows + lo - dq.first) * dq.width;
        multiply<A::rows, C::set>({dim, q, p.q.row, keys, kTile, scores, kTile, nullptr}, n, columns);
        multiply<A::rows, C::set>({dim, dout, p.dout.row, values, kTile, dp, kTile, nullptr}, n, columns);
        gradients(scores, dp, n, columns * W, p.lse + at_row, delta + at_row, z.scale);
        multiply<A::columns, C::add>({n, dout, p.dout.row, scores, kTile, dv, kTile, nullptr}, dim, columns);
        multiply<A::columns, C::add>({n, q, p.q.row, dp, kTile, dk, kTile, nullptr}, dim, columns);
        multiply<A::rows, C::add>({count, dp, kTile, rows, padded, to, dq.width, nullptr}, n, padded / W);
      }
    }
  from_lanes(dk, nullptr, p.dk, first, count, kv_head, dim);
  from_lanes(dv, nullptr, p.dv, first, count, kv_head, dim);
}

}  // namespace

#if defined(__AVX512F__)
const TileKernels kAvx512Tile{"avx512", W, scratch_floats, forward, backward, delta};
#elif defined(__AVX2__)
const TileKernels kAvx2Tile{"avx2", W, scratch_floats, forward, backward, delta};
#else
const TileKernels kPortableTile{"portable", W, scratch_floats, forward, backward, delta};
#endif

}  // namespace lct
