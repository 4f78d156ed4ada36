// The forward of attention_sm90_fwd.h as kernels, and their launch.
#include "attention_sm90_fwd.h"

#include <algorithm>

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

// The driver's function: nothing of this library needs a driver to load.
decltype(&cuTensorMapEncodeTiled) encode() {
  static const auto found = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);
  }();
  return found;
}

// Of [rows, heads, D], copied in boxes of one head, `box` rows and 64 channels.
bool describe(TensorMap* map, const Rows& x, int64_t rows, int heads, int dim, bool is_bfloat, int box) {
  const cuuint64_t sizes[3] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(rows)};
  const cuuint64_t strides[2] = {cuuint64_t(heads > 1 ? x.head : dim) * 2,
                                 cuuint64_t(rows > 1 ? x.row : int64_t(heads) * dim) * 2};
  const cuuint32_t boxes[3] = {kSpan, 1, cuuint32_t(box)}, steps[3] = {1, 1, 1};
  const auto type = is_bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode() && encode()(map, type, 3, x.data, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
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
    return "the driver does not describe tensors of these sizes and strides for bulk copies";
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  kernel<<<blocks, Shape::kThreads, kBytes, stream>>>(p, q, k, v);
  return launch_error();
}

template <class T, int D>
const char* launch(const AttentionForward& p, bool pairs, cudaStream_t stream) {
  int device, processors;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // No more blocks than there can be tiles: tables are not read here, so that a captured launch serves any plan.
  const int together = pairs ? 2 : 1, queries = ForwardShape<D>::kQueries * together;
  const int64_t tiles = (p.sizes.q_rows / queries + p.runs.runs) * p.sizes.heads;
  const int blocks = int(std::min<int64_t>(processors / together, tiles)) * together;
  return pairs ? launch<T, D, 2>(p, blocks, stream) : launch<T, D, 1>(p, blocks, stream);
}

}  // namespace
}  // namespace sm90

const char* attention_forward_cuda(const AttentionForward& p, DType dtype, bool pairs, int device, void* stream) {
  int current;
  if (cudaGetDevice(&current) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return launch_error();
  const auto to = static_cast<cudaStream_t>(stream);
  const bool wide = p.sizes.dim == 128;
  const char* error;
  if (dtype == DType::bf16)
    error = wide ? sm90::launch<BFloat, 128>(p, pairs, to) : sm90::launch<BFloat, 64>(p, pairs, to);
  else
    error = wide ? sm90::launch<Half, 128>(p, pairs, to) : sm90::launch<Half, 64>(p, pairs, to);
  cudaSetDevice(current);
  return error;
}

}  // namespace lct
