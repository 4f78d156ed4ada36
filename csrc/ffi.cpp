// What Python calls: every argument is checked, parameters are filled, and the tensors' device decides who runs.
// The public functions of lct/kernels have looked at what users gave; these checks keep a pointer from going wild.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>
#include <sstream>
#include <string>

#include "attention_cpu.h"
#include "norm_rope.h"

namespace lct {

#ifndef LCT_CUDA
constexpr const char* kNoCuda = "the library was built without CUDA";
const char* join_cuda(const JoinParams&, DType, int, void*) { return kNoCuda; }
const char* assemble_cuda(const AssembleParams&, DType, int, void*) { return kNoCuda; }
const char* backward_cuda(const BackwardParams&, DType, int, void*) { return kNoCuda; }
const char* attention_forward_cuda(const AttentionForward&, DType, bool, int, void*) { return kNoCuda; }
#endif

namespace {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr DLDataType kFloat{kDLFloat, 32, 1}, kDouble{kDLFloat, 64, 1}, kInt{kDLInt, 32, 1}, kLong{kDLInt, 64, 1};
constexpr int64_t kAny = -1;
constexpr int64_t kBlocksOnCpu = 1;     // more than there are rows for would form angles anew
constexpr int64_t kBlocksOnGpu = 1024;  // about eight for each multiprocessor of an H100

struct Where {
  DLDevice device;
  DType dtype;
  DLDataType name;
};

bool on_cpu(DLDevice device) { return device.device_type == kDLCPU || device.device_type == kDLCUDAHost; }

bool same_device(DLDevice a, DLDevice b) {
  return (on_cpu(a) && on_cpu(b)) || (a.device_type == b.device_type && a.device_id == b.device_id);
}

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

std::string name_of(DLDevice device) {
  if (on_cpu(device)) return "cpu";
  return (device.device_type == kDLCUDA ? "cuda:" : "device ") + std::to_string(device.device_id);
}

std::string shape_of(std::initializer_list<int64_t> shape) {
  std::ostringstream out;
  for (int64_t size : shape) {
    out << (out.tellp() ? ", " : "[");
    size == kAny ? out << "any" : out << size;
  }
  return out.str() + "]";
}

[[noreturn]] void refuse(const char* name, const std::string& expected, TensorView got) {
  std::ostringstream out;
  out << name << ": expected " << expected << ", got " << tvm::ffi::DLDataTypeToString(got.dtype()) << " [";
  for (int i = 0; i < got.ndim(); ++i) out << (i ? ", " : "") << got.size(i);
  out << "] on " << name_of(got.device()) << ", strides [";
  for (int i = 0; i < got.ndim(); ++i) out << (i ? ", " : "") << got.stride(i);
  TVM_FFI_THROW(ValueError) << out.str() << "]";
  throw;  // not reached
}

void check(const char* name, TensorView x, DLDataType dtype, DLDevice device, std::initializer_list<int64_t> shape) {
  bool fits = same(x.dtype(), dtype) && same_device(x.device(), device) && x.ndim() == int(shape.size());
  int i = 0;
  for (int64_t size : shape) {
    fits = fits && (size == kAny || size == x.size(i));
    ++i;
  }
  if (!fits) refuse(name, tvm::ffi::DLDataTypeToString(dtype) + " " + shape_of(shape) + " on " + name_of(device), x);
}

template <class T>
T* dense(const char* name, TensorView x, DLDataType dtype, DLDevice device, std::initializer_list<int64_t> shape,
         size_t alignment = sizeof(T)) {
  check(name, x, dtype, device, shape);
  if (x.numel() && !x.IsContiguous()) refuse(name, "a contiguous tensor", x);
  T* data = reinterpret_cast<T*>(static_cast<char*>(x.data_ptr()) + x.byte_offset());
  if (!on_cpu(device) && reinterpret_cast<uintptr_t>(data) % alignment)
    refuse(name, "an address that is a multiple of " + std::to_string(alignment) + " bytes", x);
  return data;
}

// A kernel reads 16 bytes at once; on the CPU any address will do. `anywhere`: it may also lie in CPU memory.
Rows rows_of(const char* name, TensorView x, const Where& at, int64_t rows, int64_t heads, int64_t dim,
             bool anywhere = false) {
  const bool host = anywhere && on_cpu(x.device());
  check(name, x, at.name, host ? x.device() : at.device, {rows, heads, dim});
  void* data = static_cast<char*>(x.data_ptr()) + x.byte_offset();
  if (!x.numel()) return {data, 0, 0};
  if (dim > 1 && x.stride(2) != 1) refuse(name, "contiguous channels", x);
  if (!on_cpu(at.device)) {
    bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < 2; ++i) aligned = aligned && (x.size(i) == 1 || x.stride(i) * (at.name.bits / 8) % 16 == 0);
    if (!aligned) refuse(name, "an address and strides that are multiples of 16 bytes", x);
  }
  return {data, x.stride(0), x.stride(1)};
}

Where where(const char* name, TensorView x) {
  const DLDataType dtype = x.dtype();
  const bool single = same(dtype, kFloat), half = same(dtype, {kDLFloat, 16, 1});
  if (!single && !half && !same(dtype, {kDLBfloat, 16, 1})) refuse(name, "float16, bfloat16 or float32", x);
  if (!on_cpu(x.device()) && x.device().device_type != kDLCUDA) refuse(name, "a tensor on cpu or cuda", x);
  if (x.ndim() != 3) refuse(name, "[rows, heads, head_dim]", x);
  const int64_t dim = x.size(2);
  if (dim % kChannels || dim < kChannels || dim > kMaxLanes * kChannels)
    refuse(name, "a head_dim that is a multiple of 8, at most 256", x);
  return {x.device(), single ? DType::fp32 : half ? DType::fp16 : DType::bf16, dtype};
}

// Rows that a tensor of `limit` rows has. On a GPU this look would wait for the device.
const int64_t* indices(const char* name, TensorView x, const Where& at, int64_t count, int64_t limit) {
  const int64_t* data = dense<int64_t>(name, x, kLong, at.device, {count});
  if (on_cpu(at.device))
    for (int64_t i = 0; i < count; ++i)
      if (data[i] < 0 || data[i] >= limit)
        TVM_FFI_THROW(ValueError) << name << ": expected rows of " << limit << ", got " << data[i] << " at " << i;
  return data;
}

Rope rope_of(TensorView positions, TensorView frequencies, TensorView axes, DLDevice device, int64_t rows, int dim) {
  const int64_t pairs = frequencies.ndim() == 1 ? frequencies.size(0) : kAny;
  Rope rope{dense<float>("positions", positions, kFloat, device, {rows, 3}),
            dense<double>("frequencies", frequencies, kDouble, device, {pairs}),
            dense<int32_t>("axes", axes, kInt, device, {pairs}), int(pairs)};
  if (2 * pairs > dim) refuse("frequencies", "at most " + std::to_string(dim / 2) + " = head_dim / 2", frequencies);
  if (on_cpu(device))
    for (int i = 0; i < rope.pairs; ++i)
      if (rope.axes[i] < 0 || rope.axes[i] > 2)
        TVM_FFI_THROW(ValueError) << "axes: expected 0, 1 or 2, got " << rope.axes[i] << " at " << i;
  return rope;
}

int64_t wanted(int64_t blocks, DLDevice device) {
  if (blocks < 0) TVM_FFI_THROW(ValueError) << "blocks: expected 0, for what suits the device, or more, got " << blocks;
  return blocks ? blocks : on_cpu(device) ? kBlocksOnCpu : kBlocksOnGpu;
}

Sizes joint_sizes(int64_t heads, int64_t all_heads, int64_t dim, bool by_row, int64_t texts, int64_t videos,
                  int64_t blocks, DLDevice device) {
  const int64_t kv_heads = (all_heads - heads) / 2;
  if (heads < 1 || kv_heads < 1 || heads + 2 * kv_heads != all_heads)
    TVM_FFI_THROW(ValueError) << "heads: expected " << all_heads << " = heads + 2 * kv_heads, got " << heads;
  return sizes_of(int(heads), int(kv_heads), int(dim), by_row, texts, videos, wanted(blocks, device));
}

template <class Params>
void run(const Params& params, const Where& at, int64_t threads, void (*cpu)(const Params&, DType, int),
         const char* (*cuda)(const Params&, DType, int, void*)) {
  if (on_cpu(at.device)) return cpu(params, at.dtype, int(threads));
  void* stream = TVMFFIEnvGetStream(kDLCUDA, at.device.device_id);
  if (const char* error = cuda(params, at.dtype, at.device.device_id, stream)) TVM_FFI_THROW(RuntimeError) << error;
}

// The two streams, as every operation on QKV is given them.
struct Streams {
  TensorView qkv[2], q_norm[2], k_norm[2], joint[2];
};

void fill(Stream (&streams)[2], const Streams& given, const Sizes& sizes, const Where& at) {
  static const char* const names[2][4] = {{"text_qkv", "text_q_norm", "text_k_norm", "text_rows"},
                                          {"video_qkv", "video_q_norm", "video_k_norm", "video_rows"}};
  const int64_t dim = sizes.dim, rows = sizes.rows[0] + sizes.rows[1];
  for (int i = 0; i < 2; ++i) {
    const auto& name = names[i];
    streams[i] = {
        rows_of(name[0], given.qkv[i], at, sizes.rows[i], sizes.heads + 2 * sizes.kv_heads, dim),
        dense<float>(name[1], given.q_norm[i], kFloat, at.device, {sizes.by_row ? sizes.heads * dim : dim}, 16),
        dense<float>(name[2], given.k_norm[i], kFloat, at.device, {sizes.by_row ? sizes.kv_heads * dim : dim}, 16),
        indices(name[3], given.joint[i], at, sizes.rows[i], rows)};
  }
}

void join(TensorView text_qkv, TensorView video_qkv, TensorView text_q_norm, TensorView text_k_norm,
          TensorView video_q_norm, TensorView video_k_norm, TensorView text_rows, TensorView video_rows,
          TensorView positions, TensorView frequencies, TensorView axes, TensorView q, TensorView k, TensorView v,
          Optional<TensorView> slots, Optional<TensorView> k_pool, Optional<TensorView> v_pool,
          Optional<TensorView> pool_slots, double eps, bool by_row, int64_t blocks, int64_t threads) {
  const Where at = where("video_qkv", video_qkv);
  where("text_qkv", text_qkv);
  where("q", q);
  JoinParams p{};
  p.sizes = joint_sizes(q.size(1), video_qkv.size(1), video_qkv.size(2), by_row, text_qkv.size(0), video_qkv.size(0),
                        blocks, at.device);
  const int64_t dim = p.sizes.dim, kv_heads = p.sizes.kv_heads, rows = p.sizes.rows[0] + p.sizes.rows[1];
  const Streams given{{text_qkv, video_qkv}, {text_q_norm, video_q_norm}, {text_k_norm, video_k_norm},
                      {text_rows, video_rows}};
  fill(p.streams, given, p.sizes, at);
  p.rope = rope_of(positions, frequencies, axes, at.device, rows, p.sizes.dim);
  p.q = rows_of("q", q, at, rows, p.sizes.heads, dim);
  const int64_t there = slots ? kAny : rows;
  p.context = {rows_of("k", k, at, there, kv_heads, dim), rows_of("v", v, at, there, kv_heads, dim), nullptr};
  if (k.size(0) != v.size(0)) refuse("v", "as many rows as k has, " + std::to_string(k.size(0)), v);
  if (slots) p.context.slots = indices("slots", slots.value(), at, rows, k.size(0));
  if (k_pool) {
    if (!v_pool || !pool_slots) TVM_FFI_THROW(ValueError) << "k_pool: expected v_pool and pool_slots beside it";
    const TensorView pool = k_pool.value();
    p.pool = {rows_of("k_pool", pool, at, kAny, kv_heads, dim, true),
              rows_of("v_pool", v_pool.value(), at, pool.size(0), kv_heads, dim, true),
              indices("pool_slots", pool_slots.value(), at, rows, pool.size(0))};
  }
  p.eps = float(eps);
  run(p, at, threads, join_cpu, join_cuda);
}

void assemble(TensorView k_pool, TensorView v_pool, TensorView pool_slots, TensorView k_cache, TensorView v_cache,
              TensorView slots, TensorView positions, TensorView frequencies, TensorView axes, int64_t blocks,
              int64_t threads) {
  const Where at = where("k_cache", k_cache);
  if (slots.ndim() != 1 || k_pool.ndim() != 3) refuse("slots", "[rows], and a pool [rows, heads, head_dim]", slots);
  const int64_t heads = k_cache.size(1), dim = k_cache.size(2), rows = slots.size(0);
  AssembleParams p{};
  p.sizes = sizes_of(0, int(heads), int(dim), false, rows, 0, wanted(blocks, at.device));
  p.rope = rope_of(positions, frequencies, axes, at.device, rows, int(dim));
  p.pool = {rows_of("k_pool", k_pool, at, kAny, heads, dim, true),
            rows_of("v_pool", v_pool, at, k_pool.size(0), heads, dim, true),
            indices("pool_slots", pool_slots, at, rows, k_pool.size(0))};
  p.context = {rows_of("k_cache", k_cache, at, kAny, heads, dim),
               rows_of("v_cache", v_cache, at, k_cache.size(0), heads, dim),
               indices("slots", slots, at, rows, k_cache.size(0))};
  run(p, at, threads, assemble_cpu, assemble_cuda);
}

void backward(TensorView dq, TensorView dk, TensorView dv, TensorView text_qkv, TensorView video_qkv,
              TensorView text_q_norm, TensorView text_k_norm, TensorView video_q_norm, TensorView video_k_norm,
              TensorView text_rows, TensorView video_rows, TensorView positions, TensorView frequencies,
              TensorView axes, TensorView d_text_qkv, TensorView d_video_qkv, TensorView d_text_q_norm,
              TensorView d_text_k_norm, TensorView d_video_q_norm, TensorView d_video_k_norm, double eps, bool by_row,
              int64_t blocks, int64_t threads) {
  const Where at = where("video_qkv", video_qkv);
  where("text_qkv", text_qkv);
  where("dq", dq);
  BackwardParams p{};
  p.sizes = joint_sizes(dq.size(1), video_qkv.size(1), video_qkv.size(2), by_row, text_qkv.size(0), video_qkv.size(0),
                        blocks, at.device);
  const int64_t dim = p.sizes.dim, kv_heads = p.sizes.kv_heads, rows = p.sizes.rows[0] + p.sizes.rows[1];
  const Streams given{{text_qkv, video_qkv}, {text_q_norm, video_q_norm}, {text_k_norm, video_k_norm},
                      {text_rows, video_rows}};
  fill(p.streams, given, p.sizes, at);
  p.rope = rope_of(positions, frequencies, axes, at.device, rows, p.sizes.dim);
  p.dq = rows_of("dq", dq, at, rows, p.sizes.heads, dim);
  p.dk = rows_of("dk", dk, at, rows, kv_heads, dim);
  p.dv = rows_of("dv", dv, at, rows, kv_heads, dim);
  const TensorView qkv[2] = {d_text_qkv, d_video_qkv}, q_norm[2] = {d_text_q_norm, d_video_q_norm},
                   k_norm[2] = {d_text_k_norm, d_video_k_norm};
  const int64_t q_width = by_row ? p.sizes.heads * dim : dim, k_width = by_row ? kv_heads * dim : dim;
  for (int i = 0; i < 2; ++i) {
    const int64_t heads = p.sizes.heads + 2 * kv_heads, parts = partial_rows_of(p.sizes, i);
    p.gradients[i] = {
        rows_of(i ? "d_video_qkv" : "d_text_qkv", qkv[i], at, p.sizes.rows[i], heads, dim),
        dense<float>(i ? "d_video_q_norm" : "d_text_q_norm", q_norm[i], kFloat, at.device, {parts, q_width}),
        dense<float>(i ? "d_video_k_norm" : "d_text_k_norm", k_norm[i], kFloat, at.device, {parts, k_width})};
  }
  p.eps = float(eps);
  run(p, at, threads, backward_cpu, backward_cuda);
}

// How many rows of partial sums `backward` makes of the norm weights' gradients of a stream.
int64_t partial_rows(TensorView text_qkv, TensorView video_qkv, int64_t heads, bool by_row, int64_t blocks,
                     int64_t stream) {
  const Where at = where("video_qkv", video_qkv);
  where("text_qkv", text_qkv);
  if (stream != 0 && stream != 1) TVM_FFI_THROW(ValueError) << "stream: expected 0 or 1, got " << stream;
  const Sizes sizes = joint_sizes(heads, video_qkv.size(1), video_qkv.size(2), by_row, text_qkv.size(0),
                                  video_qkv.size(0), blocks, at.device);
  return partial_rows_of(sizes, int(stream));
}

// -- attention ---------------------------------------------------------------------------------------------------------

RunTable table_on(DLDevice device, const char* name, TensorView x) {
  const RunTable table{dense<int32_t>(name, x, kInt, device, {kAny, kAny}), int(x.size(0)), int(x.size(1))};
  if (table.width < 4 || table.width % 2) refuse(name, "rows of (start, end, lo, hi, …)", x);
  return table;
}

// A table of runs in CPU memory, none of which leaves its rows.
RunTable table_of(const char* name, TensorView x, int64_t rows, int64_t seen_rows) {
  const RunTable table = table_on({kDLCPU, 0}, name, x);
  for (int i = 0; i < table.runs; ++i)
    for (int j = 0; j < table.width; j += 2) {
      const int32_t begin = table[i][j], end = table[i][j + 1];
      const int64_t limit = j ? seen_rows : rows;
      if (begin < 0 || begin > end || end > limit)
        TVM_FFI_THROW(ValueError) << name << ": expected intervals of " << limit << " rows, got [" << begin << ", " << end
                                  << ") in run " << i;
    }
  return table;
}

AttentionSizes attention_sizes(TensorView q, TensorView k, double scale, DLDataType dtype = kFloat,
                               DLDevice device = {kDLCPU, 0}) {
  check("q", q, dtype, device, {kAny, kAny, kAny});
  check("k", k, dtype, device, {kAny, kAny, q.size(2)});
  if (q.size(2) < 1 || q.size(2) > kMaxDim) refuse("q", "a head_dim of 1 to " + std::to_string(kMaxDim), q);
  if (!k.size(1) || q.size(1) % k.size(1)) refuse("k", "heads that divide " + std::to_string(q.size(1)), k);
  return {q.size(0), k.size(0), int(q.size(1)), int(k.size(1)), int(q.size(2)), float(scale)};
}

void refuse_isa(const tvm::ffi::String& isa) {
  TVM_FFI_THROW(ValueError) << "isa: expected one of " << attention_isas() << ", or nothing, got " << isa;
}

void attention_forward(TensorView q, TensorView k, TensorView v, TensorView table, TensorView out, TensorView lse,
                       double scale, const tvm::ffi::String& isa, int64_t threads) {
  const AttentionSizes z = attention_sizes(q, k, scale);
  const Where at{q.device(), DType::fp32, kFloat};
  const AttentionForward p{z,
                           table_of("table", table, z.q_rows, z.k_rows),
                           rows_of("q", q, at, z.q_rows, z.heads, z.dim),
                           rows_of("k", k, at, z.k_rows, z.kv_heads, z.dim),
                           rows_of("v", v, at, z.k_rows, z.kv_heads, z.dim),
                           rows_of("out", out, at, z.q_rows, z.heads, z.dim),
                           dense<float>("lse", lse, kFloat, at.device, {z.heads, z.q_rows})};
  if (!attention_forward_cpu(p, isa.c_str(), int(threads))) refuse_isa(isa);
}

void attention_backward(TensorView dout, TensorView dlse, TensorView q, TensorView k, TensorView v, TensorView out,
                        TensorView lse, TensorView table, TensorView key_table, TensorView dq, TensorView dk,
                        TensorView dv, double scale, const tvm::ffi::String& isa, int64_t threads) {
  const AttentionSizes z = attention_sizes(q, k, scale);
  const Where at{q.device(), DType::fp32, kFloat};
  const auto of_queries = [&](const char* name, TensorView x) { return rows_of(name, x, at, z.q_rows, z.heads, z.dim); };
  const auto of_keys = [&](const char* name, TensorView x) { return rows_of(name, x, at, z.k_rows, z.kv_heads, z.dim); };
  const AttentionBackward p{z,
                            table_of("table", table, z.q_rows, z.k_rows),
                            table_of("key_table", key_table, z.k_rows, z.q_rows),
                            of_queries("dout", dout),
                            of_queries("q", q),
                            of_keys("k", k),
                            of_keys("v", v),
                            of_queries("out", out),
                            of_queries("dq", dq),
                            of_keys("dk", dk),
                            of_keys("dv", dv),
                            dense<float>("lse", lse, kFloat, at.device, {z.heads, z.q_rows}),
                            dense<float>("dlse", dlse, kFloat, at.device, {z.heads, z.q_rows})};
  if (!attention_backward_cpu(p, isa.c_str(), int(threads))) refuse_isa(isa);
}

// `host_table`, which the launch does not wait for, is what is checked; `table` is its copy on the device.
void attention_forward_on_gpu(TensorView q, TensorView k, TensorView v, TensorView table, TensorView host_table,
                              TensorView out, TensorView lse, double scale, bool pairs) {
  const Where at = where("q", q);
  if (on_cpu(at.device) || at.dtype == DType::fp32) refuse("q", "float16 or bfloat16 on cuda", q);
  if (q.size(2) != 64 && q.size(2) != 128) refuse("q", "a head_dim of 64 or 128", q);
  if (!(scale > 0)) TVM_FFI_THROW(ValueError) << "scale: expected a number above 0, got " << scale;
  const AttentionSizes z = attention_sizes(q, k, scale, at.name, at.device);
  const RunTable checked = table_of("host_table", host_table, z.q_rows, z.k_rows);
  const AttentionForward p{z,
                           table_on(at.device, "table", table),
                           rows_of("q", q, at, z.q_rows, z.heads, z.dim),
                           rows_of("k", k, at, z.k_rows, z.kv_heads, z.dim),
                           rows_of("v", v, at, z.k_rows, z.kv_heads, z.dim),
                           rows_of("out", out, at, z.q_rows, z.heads, z.dim),
                           dense<float>("lse", lse, kFloat, at.device, {z.heads, z.q_rows})};
  if (p.runs.runs != checked.runs || p.runs.width != checked.width) refuse("table", "the shape of host_table", table);
  void* stream = TVMFFIEnvGetStream(kDLCUDA, at.device.device_id);
  if (const char* error = attention_forward_cuda(p, at.dtype, pairs, at.device.device_id, stream))
    TVM_FFI_THROW(RuntimeError) << error;
}

tvm::ffi::String attention_names() { return attention_isas(); }

}  // namespace
}  // namespace lct

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_forward, lct::attention_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_backward, lct::attention_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_forward_on_gpu, lct::attention_forward_on_gpu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_isas, lct::attention_names);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope_join, lct::join);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope_assemble, lct::assemble);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope_backward, lct::backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_rope_partial_rows, lct::partial_rows);
