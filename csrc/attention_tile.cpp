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
constexpr int kRows = 6;    // rows of a block of the product: 6 · kVectors sums stay in registers
constexpr int kChain = 32;  // terms of a gradient that are added up one after the other

typedef float V __attribute__((vector_size(4 * W), aligned(4 * W), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * W), aligned(4 * W), may_alias));
typedef double Wide __attribute__((vector_size(8 * W)));
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

// e^x for x ≤ 0, to an ulp or so; 0 below −87, NaN of NaN. x = n ln 2 + f, ln 2 in two parts, the first of which has so
// few bits that its product with n is exact; then Cephes' polynomial, times 2^n, whose exponent is in the low bits.
inline V exponential(V x) {
  const V shifted = x * 1.44269504f + 12583039.f, n = shifted - 12583039.f;  // 1.5 · 2^23 + 127
  const V f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.f;
  const U power = reinterpret_cast<const U&>(shifted) << 23;
  return x < -87.f ? V{} : p * reinterpret_cast<const V&>(power);
}

// -- products ----------------------------------------------------------------------------------------------------------

// Where A(i, k) lies: at a[i · stride + k], or at a[i + k · stride].
enum class A { rows, columns };
// What becomes of C: the scaled sum, C plus the sum, or C times a factor of each lane plus the sum.
enum class C { set, add, scale };

struct Product {
  int k;
  const float* a;
  int64_t a_stride;
  const float* b;  // [k][lanes], aligned
  int64_t b_stride;
  float* c;  // [rows][lanes], aligned
  int64_t c_stride;
  const float* factor = nullptr;  // of every lane, for C::scale
  float scale = 1;                // of sums that are set
};

// The sums over p.k[begin, end), and what becomes of C by them.
template <int R, int N, A form, C update>
inline void block(const Product& p, int row, int lane, int begin, int end) {
  V sum[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = V{};
  const float* a = p.a + (form == A::rows ? row * p.a_stride + begin : begin * p.a_stride + row);
  const float* b = p.b + begin * p.b_stride + lane;
  for (int k = begin; k < end; ++k) {
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
      if (update == C::set) to = sum[i][j] * p.scale;
      if (update == C::add) to += sum[i][j];
      if (update == C::scale) to = to * at(p.factor + lane + j * W) + sum[i][j];
    }
}

// Gradients are sums of many terms of one size: short chains of them keep what is rounded away small.
template <int R, int N, A form, C update>
inline void block(const Product& p, int row, int lane) {
  if (update != C::add) return block<R, N, form, update>(p, row, lane, 0, p.k);
  for (int k = 0; k < p.k; k += kChain)
    block<R, N, form, update>(p, row, lane, k, k + kChain < p.k ? k + kChain : p.k);
}

// Rows in blocks as even as can be: a last one of few rows would wait for its own sums.
template <int N, A form, C update>
void columns(const Product& p, int rows, int lane) {
  for (int row = 0, blocks = (rows + kRows - 1) / kRows; blocks; --blocks) {
    const int height = (rows - row + blocks - 1) / blocks;
    switch (height) {
      case 6: block<6, N, form, update>(p, row, lane); break;
      case 5: block<5, N, form, update>(p, row, lane); break;
      case 4: block<4, N, form, update>(p, row, lane); break;
      case 3: block<3, N, form, update>(p, row, lane); break;
      case 2: block<2, N, form, update>(p, row, lane); break;
      case 1: block<1, N, form, update>(p, row, lane); break;
    }
    row += height;
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

#if defined(__clang__) || __GNUC__ >= 12
template <int S, int... J>
inline V low(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
}
template <int S, int... J>
inline V high(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
}
#else  // GCC before 12 has it by another name
template <int S, int... J>
inline V low(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, U{((J & S) ? W + J - S : J)...});
}
template <int S, int... J>
inline V high(V a, V b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, U{((J & S) ? W + J : J + S)...});
}
#endif

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
void into_lanes(const Rows& x, int64_t first, int count, int head, int dim, float* lanes) {
  for (int row = 0; row < count; row += W)
    for (int channel = 0; channel < dim; channel += W) {
      V square[W];
      for (int i = 0; i < W; ++i)
        square[i] = row + i < count ? channels_of(row_of(x, first + row + i, head), channel, dim) : V{};
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

// Rows [n, D], `stride` apart, into rows [n, D padded] beside one another.
void copy_rows(const float* rows, int64_t stride, int n, int dim, float* copy) {
  const int padded = vectors(dim) * W;
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < dim; c += W) at(copy + i * padded + c) = channels_of(rows + i * stride, c, dim);
}

struct Block {
  const float* data;
  int64_t stride;
};

// `n` rows as they lie or, where whole pages between them put them all into one set of the first cache, copied together.
// With AVX-512 a product is wide enough to wait for none.
Block together(const float* rows, int64_t stride, int n, int dim, float* copy) {
  if (W == 16 || stride % 1024) return {rows, stride};
  copy_rows(rows, stride, n, dim, copy);
  return {copy, vectors(dim) * W};
}

// -- forward -----------------------------------------------------------------------------------------------------------

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

// What is kept of kTile query rows while keys go by.
struct Queries {
  float *lanes, *out;           // [D padded, kTile]
  float *peak, *total, *kept;   // [kTile]
  int count, columns;

  static int64_t floats(int padded) { return (2 * padded + 3) * kTile; }
  Queries(float* at, int padded, int count) : count(count), columns(vectors(count)) {
    lanes = at, out = lanes + padded * kTile, peak = out + padded * kTile, total = peak + kTile, kept = total + kTile;
  }
};

int64_t forward_floats(int dim) {
  const int64_t padded = vectors(dim) * W;
  return kTile * kBlock + kBlock * padded + kForwardTiles * Queries::floats(padded);
}

void forward(const AttentionForward& p, const int32_t* run, int64_t first, int count, int head, float* scratch) {
  const int dim = p.sizes.dim, padded = vectors(dim) * W;
  const int kv_head = head / (p.sizes.heads / p.sizes.kv_heads);
  float *scores = scratch, *copy = scores + kTile * kBlock, *states = copy + kBlock * padded;
  const auto queries = [&](int row) {
    return Queries(states + row / kTile * Queries::floats(padded), padded, count - row < kTile ? count - row : kTile);
  };
  for (int row = 0; row < count; row += kTile) {
    const Queries x = queries(row);
    into_lanes(p.q, first + row, x.count, head, dim, x.lanes);
    std::memset(x.out, 0, sizeof(float) * padded * kTile);
    for (int i = 0; i < kTile; ++i) x.peak[i] = -INFINITY, x.total[i] = 0;
  }
  for (int interval = 0; interval < p.runs.intervals(); ++interval)
    for (int64_t lo = run[2 + 2 * interval], hi = run[3 + 2 * interval]; lo < hi; lo += kBlock) {
      const int n = int(hi - lo < kBlock ? hi - lo : kBlock);
      const float* keys = row_of(p.k, lo, kv_head);
      const Block values = together(row_of(p.v, lo, kv_head), p.v.row, n, dim, copy);
      for (int row = 0; row < count; row += kTile) {
        const Queries x = queries(row);
        multiply<A::rows, C::set>({dim, keys, p.k.row, x.lanes, kTile, scores, kTile, nullptr, p.sizes.scale}, n, x.columns);
        softmax(scores, n, x.columns * W, x.peak, x.total, x.kept);
        multiply<A::columns, C::scale>({n, values.data, values.stride, scores, kTile, x.out, kTile, x.kept}, dim,
                                       x.columns);
      }
    }
  for (int row = 0; row < count; row += kTile) {
    const Queries x = queries(row);
    float* lse = p.lse + head * p.sizes.q_rows + first + row;
    for (int i = 0; i < x.count; ++i) lse[i] = x.peak[i] + __builtin_logf(x.total[i]);
    for (int i = 0; i < x.columns * W; i += W) at(x.total + i) = 1.f / at(x.total + i);
    from_lanes(x.out, x.total, p.out, first + row, x.count, head, dim);
  }
}

// -- backward ----------------------------------------------------------------------------------------------------------

// In double: where one weight is near 1, dP − δ is all that is left of two large numbers.
void delta(const AttentionBackward& p, int64_t first, int count, int head, float* delta) {
  for (int i = 0; i < count; ++i) {
    const float *a = row_of(p.dout, first + i, head), *b = row_of(p.out, first + i, head);
    Wide lanes{};
    for (int d = 0; d < p.sizes.dim; d += W)
      lanes += __builtin_convertvector(channels_of(a, d, p.sizes.dim), Wide) *
               __builtin_convertvector(channels_of(b, d, p.sizes.dim), Wide);
    double sum = -p.dlse[head * p.sizes.q_rows + first + i];
    for (int j = 0; j < W; ++j) sum += lanes[j];
    delta[i] = float(sum);
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

// What is kept of kTile key rows while queries go by.
struct Keys {
  float *keys, *values, *dk, *dv;  // [D padded, kTile]
  float* rows;                     // keys [kTile, D padded]
  int count, columns;

  static int64_t floats(int padded) { return 5 * padded * kTile; }
  Keys(float* at, int padded, int count) : count(count), columns(vectors(count)) {
    const int tile = padded * kTile;
    keys = at, values = keys + tile, dk = values + tile, dv = dk + tile, rows = dv + tile;
  }
};

int64_t backward_floats(int dim) {
  const int64_t padded = vectors(dim) * W;
  return 2 * kTile * kBlock + 2 * kBlock * padded + kBackwardTiles * Keys::floats(padded);
}

void backward(const AttentionBackward& p, const float* delta, const int32_t* run, int64_t first, int count, int kv_head,
              const PartialDq& dq, float* scratch) {
  const AttentionSizes& z = p.sizes;
  const int dim = z.dim, padded = vectors(dim) * W, group = z.heads / z.kv_heads;
  float *scores = scratch, *dp = scores + kTile * kBlock, *copy = dp + kTile * kBlock;
  float* states = copy + 2 * kBlock * padded;
  const auto keys = [&](int row) {
    return Keys(states + row / kTile * Keys::floats(padded), padded, count - row < kTile ? count - row : kTile);
  };
  for (int row = 0; row < count; row += kTile) {
    const Keys x = keys(row);
    into_lanes(p.k, first + row, x.count, kv_head, dim, x.keys);
    into_lanes(p.v, first + row, x.count, kv_head, dim, x.values);
    copy_rows(row_of(p.k, first + row, kv_head), p.k.row, x.count, dim, x.rows);
    std::memset(x.dk, 0, sizeof(float) * padded * kTile);
    std::memset(x.dv, 0, sizeof(float) * padded * kTile);
  }
  for (int interval = 0; interval < p.key_runs.intervals(); ++interval)
    for (int64_t lo = run[2 + 2 * interval], hi = run[3 + 2 * interval]; lo < hi; lo += kBlock) {
      const int n = int(hi - lo < kBlock ? hi - lo : kBlock);
      for (int g = 0; g < group; ++g) {
        const int head = kv_head * group + g;
        const int64_t statistic = head * z.q_rows + lo;
        const Block q = together(row_of(p.q, lo, head), p.q.row, n, dim, copy);
        const Block dout = together(row_of(p.dout, lo, head), p.dout.row, n, dim, copy + kBlock * padded);
        float* to = dq.data + g * dq.head + (lo - dq.first) * dq.row;
        for (int row = 0; row < count; row += kTile) {
          const Keys x = keys(row);
          multiply<A::rows, C::set>({dim, q.data, q.stride, x.keys, kTile, scores, kTile, nullptr, z.scale}, n, x.columns);
          multiply<A::rows, C::set>({dim, dout.data, dout.stride, x.values, kTile, dp, kTile}, n, x.columns);
          gradients(scores, dp, n, x.columns * W, p.lse + statistic, delta + statistic, z.scale);
          multiply<A::columns, C::add>({n, dout.data, dout.stride, scores, kTile, x.dv, kTile}, dim, x.columns);
          multiply<A::columns, C::add>({n, q.data, q.stride, dp, kTile, x.dk, kTile}, dim, x.columns);
          multiply<A::rows, C::add>({x.count, dp, kTile, x.rows, padded, to, dq.row}, n, padded / W);
        }
      }
    }
  for (int row = 0; row < count; row += kTile) {
    const Keys x = keys(row);
    from_lanes(x.dk, nullptr, p.dk, first + row, x.count, kv_head, dim);
    from_lanes(x.dv, nullptr, p.dv, first + row, x.count, kv_head, dim);
  }
}

}  // namespace

#if defined(__AVX512F__)
const TileKernels kAvx512Tile{"avx512", W, forward_floats, backward_floats, forward, backward, delta};
#elif defined(__AVX2__)
const TileKernels kAvx2Tile{"avx2", W, forward_floats, backward_floats, forward, backward, delta};
#else
const TileKernels kPortableTile{"portable", W, forward_floats, backward_floats, forward, backward, delta};
#endif

}  // namespace lct
