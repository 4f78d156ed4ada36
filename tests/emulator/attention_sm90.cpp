// What the tests call of the Hopper kernels, by ctypes: the forward on the emulated GPU, and the index arithmetic.
#include <string>

#include "attention_sm90_fwd.h"

namespace lct::sm90 {
namespace {

struct Call {
  AttentionForward params;
  int blocks;
  uint64_t seed;
};

template <class T, int D, int kCluster>
void forward(const Call& c) {
  using Kernel = Forward<T, D, kCluster>;
  using Shape = ForwardShape<D>;
  const auto map = [](const Rows& x, int64_t rows, int heads, int box) {
    return TensorMap{static_cast<const uint16_t*>(x.data), rows, heads, D, x.row, x.head, box};
  };
  const AttentionSizes& z = c.params.sizes;
  constexpr int kBox = Shape::kKeys / kCluster;
  const TensorMap q = map(c.params.q, z.q_rows, z.heads, Shape::kQueries),
                  k = map(c.params.k, z.k_rows, z.kv_heads, kBox), v = map(c.params.v, z.k_rows, z.kv_heads, kBox);
  emulated::Machine machine(c.seed);
  machine.run(c.blocks, kCluster, Shape::kThreads, sizeof(typename Kernel::Memory), [&](uint8_t* memory) {
    Kernel(*reinterpret_cast<typename Kernel::Memory*>(memory), c.params, q, k, v).run();
  });
}

template <class T>
void choose(const Call& c, int cluster) {
  if (c.params.sizes.dim == 64) return cluster == 2 ? forward<T, 64, 2>(c) : forward<T, 64, 1>(c);
  return cluster == 2 ? forward<T, 128, 2>(c) : forward<T, 128, 1>(c);
}

}  // namespace
}  // namespace lct::sm90

using namespace lct::sm90;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Null, or what went wrong. `strides`: of rows and heads of q, k, v and out; `cluster` is 1 or 2 and divides `blocks`.
EXPORT const char* forward_emulated(void* q, void* k, void* v, const int32_t* table, void* out, float* lse,
                                    int64_t q_rows, int64_t k_rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                    int64_t runs, int64_t width, const int64_t* strides, double scale,
                                    int64_t is_bfloat, int64_t blocks, int64_t cluster, int64_t seed) {
  static std::string error;
  const auto at = [strides](void* data, int i) { return lct::Rows{data, strides[2 * i], strides[2 * i + 1]}; };
  const Call call{{{q_rows, k_rows, int(heads), int(kv_heads), int(dim), float(scale)},
                   {table, int(runs), int(width)},
                   at(q, 0), at(k, 1), at(v, 2), at(out, 3), lse},
                  int(blocks),
                  uint64_t(seed)};
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
  const Tile tile = tile_at({table, int(runs), int(width)}, int(heads), int(size), int(index));
  found[0] = tile.run, found[1] = tile.first, found[2] = tile.head;
}

EXPORT int64_t most_tiles_of(int64_t rows, int64_t runs, int64_t heads, int64_t size) {
  return most_tiles(rows, int(runs), int(heads), int(size));
}

// Writes (first, count) of every key tile of a run; returns how many.
EXPORT int64_t key_tiles(const int32_t* table, int64_t runs, int64_t width, int64_t run, int64_t size, int32_t* found) {
  int64_t count = 0;
  for (KeyTiles keys({table, int(runs), int(width)}, int(run), int(size)); keys.more(); keys.next()) {
    found[2 * count] = keys.first();
    found[2 * count++ + 1] = keys.count();
  }
  return count;
}

EXPORT int64_t row_of_element(int64_t thread, int64_t i) { return row_of(int(thread), int(i)); }
EXPORT int64_t column_of_element(int64_t thread, int64_t i) { return column_of(int(thread), int(i)); }

EXPORT int64_t swizzled_offset(int64_t rows, int64_t row, int64_t channel) {
  return swizzled(int(rows), int(row), int(channel));
}
