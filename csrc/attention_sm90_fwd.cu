// The forward of attention_sm90_fwd.h as kernels, and their launch.
#include "attention_sm90_fwd.h"

#include <algorithm>

#include "sm90_launch.h"

namespace lct {
namespace sm90 {
namespace {

template <class T, int D, int kCluster>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(ForwardShape<D>::kThreads, 1)
    forward_kernel(const __grid_constant__ AttentionForward p, const __grid_constant__ TensorMap q,
                   const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using Body = Forward<T, D, kCluster>;
  Body(*reinterpret_cast<typename Body::Memory*>(memory), p, q, k, v).run();
}

template <class T, int D, int kCluster>
const char* launch(const AttentionForward& p, int blocks, cudaStream_t stream) {
  using Shape = ForwardShape<D>;
  const AttentionSizes& z = p.sizes;
  const auto kernel = forward_kernel<T, D, kCluster>;
  constexpr int kBytes = sizeof(typename Forward<T, D, kCluster>::Memory), kBox = Shape::kKeys / kCluster;
  constexpr bool kIsBFloat = std::is_same_v<T, BFloat>;
  TensorMap q, k, v;
  if (!describe(&q, p.q, z.q_rows, z.heads, D, kIsBFloat, Shape::kQueries) ||
      !describe(&k, p.k, z.k_rows, z.kv_heads, D, kIsBFloat, kBox) ||
      !describe(&v, p.v, z.k_rows, z.kv_heads, D, kIsBFloat, kBox))
    return kNotDescribed;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  kernel<<<blocks, Shape::kThreads, kBytes, stream>>>(p, q, k, v);
  return launch_error();
}

template <class T, int D>
const char* launch(const AttentionForward& p, bool pairs, cudaStream_t stream) {
  const int together = pairs ? 2 : 1, queries = ForwardShape<D>::kQueries * together;
  const int tiles = most_tiles(p.sizes.q_rows, p.runs.runs, p.sizes.heads, queries);
  const int blocks = std::min(processors() / together, tiles) * together;
  return pairs ? launch<T, D, 2>(p, blocks, stream) : launch<T, D, 1>(p, blocks, stream);
}

}  // namespace
}  // namespace sm90

const char* attention_forward_cuda(const AttentionForward& p, DType dtype, bool pairs, int device, void* stream) {
  const OnDevice there(device);
  if (!there) return launch_error();
  const auto to = static_cast<cudaStream_t>(stream);
  const bool wide = p.sizes.dim == 128;
  if (dtype == DType::bf16)
    return wide ? sm90::launch<BFloat, 128>(p, pairs, to) : sm90::launch<BFloat, 64>(p, pairs, to);
  return wide ? sm90::launch<Half, 128>(p, pairs, to) : sm90::launch<Half, 64>(p, pairs, to);
}

}  // namespace lct
