// What the tests call of the Hopper kernels, by ctypes: the forward on the emulated GPU, and the index arithmetic.
#include <string>

#include "attention_sm90_fwd.h"

namespace lct::sm90 {
namespace {

struct Call {
  const uint16_t *q, *k, *v;
  int64_t q_rows, k_rows, heads, kv_heads, dim;
  ForwardParams params;
  int blocks;
  uint64_t seed;
};

template <class T, int D, int kCluster>
void forward(const Call& c) {
  using Kernel = Forward<T, D, kCluster>;
  using Shape = ForwardShape<D>;
  const auto map = [&](const uint16_t* data, int64_t rows, int64_t heads, int box) {
    return TensorMap{data, rows, heads, D, heads * D, D, box};
  };
  const TensorMap q = map(c.q, c.q_rows, c.heads, Shape::kQueries), k = map(c.k, c.k_rows, c.kv_heads, Shape::kKeys / kCluster),
                  v = map(c.v, c.k_rows, c.kv_heads, Shape::kKeys / kCluster);
  emulated::Machine machine(c.seed);
  machine.run(c.blocks, kCluster, Shape::kThreads, sizeof(typename Kernel::Memory), [&](uint8_t* memory) {
    Kernel(*reinterpret_cast<typename Kernel::Memory*>(memory), c.params, q, k, v).run();
  });
}

template <class T>
void choose(const Call& c, int cluster) {
  if (c.dim == 64) return cluster == 2 ? forward<T, 64, 2>(c) : forward<T, 64, 1>(c);
  return cluster == 2 ? forward<T, 128, 2>(c) : forward<T, 128, 1>(c);
}

}  // namespace
}  // namespace lct::sm90

using namespace lct::sm90;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Null, or what went wrong. Tensors are dense and in CPU memory; `cluster` is 1 or 2 and divides `blocks`.
EXPORT const char* forward_emulated(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* table,
                                    void* out, float* lse, int64_t q_rows, int64_t k_rows, int64_t heads,
                                    int64_t kv_heads, int64_t dim, int64_t runs, int64_t width, double scale,
                                    int64_t is_bfloat, int64_t blocks, int64_t cluster, int64_t seed) {
  static std::string error;
  const ForwardParams params{table,  int(runs), int(width), int(heads), int(heads / kv_heads), q_rows,
                             float(scale), out,  lse};
  const Call call{q, k, v, q_rows, k_rows, heads, kv_heads, dim, params, int(blocks), uint64_t(seed)};
  try {
    is_bfloat ? choose<lct::BFloat>(call, int(cluster)) : choose<lct::Half>(call, int(cluster));
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
  return nullptr;
}

EXPORT void tile_of(const int32_t* table, int64_t runs, int64_t width, int64_t heads, int64_t size, int64_t index,
                    int64_t* found) {
  const Tile tile = tile_at(table, int(runs), int(width), int(heads), int(size), index);
  found[0] = tile.run, found[1] = tile.first, found[2] = tile.head;
}

EXPORT int64_t swizzled_offset(int64_t rows, int64_t row, int64_t channel) {
  return swizzled(int(rows), int(row), int(channel));
}
