// The arithmetic that decides who does what, and how numbers are rounded, as functions that the tests call on the CPU.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "norm_rope.h"

namespace lct {
namespace {

using tvm::ffi::TensorView;

template <class T>
T* data_of(const char* name, TensorView x, DLDataTypeCode code, int ndim) {
  const DLDataType dtype = x.dtype();
  if (dtype.code != code || dtype.bits != 8 * sizeof(T) || x.ndim() != ndim || x.device().device_type != kDLCPU ||
      (x.numel() && !x.IsContiguous()))
    TVM_FFI_THROW(ValueError) << name << ": expected a contiguous tensor on cpu of " << ndim << " dimensions and "
                              << 8 * sizeof(T) << " bits";
  return static_cast<T*>(x.data_ptr());
}

// Adds 1 to every channel of text, video [rows, heads + 2·kv_heads, dim] int32 for each time that a lane has it, and to
// every cell of text_parts, video_parts [partial rows, q and k] int32 for each block that writes it.
void visits(TensorView text, TensorView video, TensorView text_parts, TensorView video_parts, int64_t heads,
               bool by_row, int64_t blocks) {
  int32_t* const counts[2] = {data_of<int32_t>("text", text, kDLInt, 3), data_of<int32_t>("video", video, kDLInt, 3)};
  int32_t* const parts[2] = {data_of<int32_t>("text_parts", text_parts, kDLInt, 2),
                             data_of<int32_t>("video_parts", video_parts, kDLInt, 2)};
  const int64_t all_heads = text.size(1), dim = text.size(2);
  const Sizes sizes = sizes_of(int(heads), int(all_heads - heads) / 2, int(dim), by_row, text.size(0), video.size(0),
                               blocks);
  for (int64_t block = 0; block < blocks_of(sizes); ++block)
    for (int chunk = 0; chunk < sizes.chunks; ++chunk)
      for (int team = 0; team < teams_of(sizes); ++team) {
        const Place place = place_of(sizes, block, team);
        const HostTeam lanes(sizes.lanes, int(dim) / kChannels, team);
        for (int section = 0; section < 3; ++section) {
          const Range some = common(section_of(sizes, section), chunk_of(sizes, chunk));
          const bool writes = !by_row || some.first < some.last;
          if (!team && section < 2 && writes)
            parts[place.stream][2 * partial_row_of(sizes, place.block, chunk) + section] += 1;
          for (int head = some.first; place.exists && head < some.last; ++head)
            lanes.each([&](int lane) {
              const Rows rows{nullptr, all_heads * dim, dim};
              for (int i = 0; i < kChannels; ++i)
                counts[place.stream][offset_of(rows, place.row, head, lane) + i] += 1;
            });
        }
      }
}

// out [S, D / 2, 2] fp64 gets cos and sin of every channel pair at positions [S, 3].
void turns(TensorView positions, TensorView frequencies, TensorView axes, TensorView out) {
  const Rope rope{data_of<float>("positions", positions, kDLFloat, 2),
                  data_of<double>("frequencies", frequencies, kDLFloat, 1), data_of<int32_t>("axes", axes, kDLInt, 1),
                  int(frequencies.size(0))};
  double* at = data_of<double>("out", out, kDLFloat, 3);
  for (int64_t row = 0; row < out.size(0); ++row)
    for (int lane = 0; lane < out.size(1) / kPairs; ++lane) {
      const Turns found = turns_of(rope, row, lane);
      for (int i = 0; i < kPairs; ++i) {
        *at++ = found.cos[i];
        *at++ = found.sin[i];
      }
    }
}

int64_t offset(int64_t row_stride, int64_t head_stride, int64_t row, int64_t head, int64_t lane) {
  return offset_of({nullptr, row_stride, head_stride}, row, int(head), int(lane));
}

template <class T>
void convert(const float* wide, T* narrowed, float* back, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    narrowed[i] = narrow<T>(wide[i]);
    back[i] = widen(narrowed[i]);
  }
}

// x [n] fp32 rounded to `narrowed` [n], fp16 or bf16, and that widened again.
void round_trip(TensorView x, TensorView narrowed, TensorView back) {
  const float* from = data_of<float>("x", x, kDLFloat, 1);
  float* again = data_of<float>("back", back, kDLFloat, 1);
  if (narrowed.dtype().code == kDLBfloat)
    convert(from, data_of<BFloat>("narrowed", narrowed, kDLBfloat, 1), again, x.size(0));
  else
    convert(from, data_of<Half>("narrowed", narrowed, kDLFloat, 1), again, x.size(0));
}

}  // namespace
}  // namespace lct

TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_visits, lct::visits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_turns, lct::turns);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_offset, lct::offset);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_round_trip, lct::round_trip);
