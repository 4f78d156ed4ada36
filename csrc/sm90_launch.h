// What the launches of the Hopper kernels share: tensor maps, and how many blocks run at a time.
#pragma once

#include "attention_sm90.h"
#include "sm90.cuh"

namespace lct {

namespace sm90 {

constexpr const char* kNotDescribed = "the driver does not describe tensors of these sizes and strides for bulk copies";

// The driver's function, asked for when it is needed: the library loads without a driver. Null where the driver has none.
inline decltype(&cuTensorMapEncodeTiled) encode() {
  static const auto found = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &result);
#endif
    cudaGetLastError();  // or the next launch would be blamed
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);
  }();
  return found;
}

// Of [rows, heads, D], copied in boxes of one head, `box` rows and 64 channels; false where the driver will not.
inline bool describe(TensorMap* map, const Rows& x, int64_t rows, int heads, int dim, bool is_bfloat, int box) {
  const cuuint64_t sizes[3] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(rows)};
  const cuuint64_t strides[2] = {cuuint64_t(heads > 1 ? x.head : dim) * 2,
                                 cuuint64_t(rows > 1 ? x.row : int64_t(heads) * dim) * 2};
  const cuuint32_t boxes[3] = {kSpan, 1, cuuint32_t(box)}, steps[3] = {1, 1, 1};
  const auto type = is_bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode() && encode()(map, type, 3, x.data, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline int processors() {
  int device = 0, count = 1;  // what fails here the launch reports
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace sm90
}  // namespace lct
