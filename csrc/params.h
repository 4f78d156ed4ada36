// What the kernels are given. Strides count elements, not bytes; channels are contiguous (stride 1) everywhere.
// A heads of queries, A_kv of keys and as many of values, D channels a head, S rows in joint order.
#pragma once

#include <cstdint>

namespace lct {

enum class DType { fp16, bf16, fp32 };

// [rows, heads, D] in the compute dtype.
struct Rows {
  void* data;    // null: there are none
  int64_t row;   // stride
  int64_t head;  // stride
};

// Keys and values somewhere.
struct KV {
  Rows k;                // [rows, A_kv, D]
  Rows v;                // [rows, A_kv, D]
  const int64_t* slots;  // [S], their row of every joint row; null: the joint row itself
};

struct Rope {
  const float* positions;     // [S, 3], (t, y, x)
  const double* frequencies;  // [pairs], turns for a step of position
  const int32_t* axes;        // [pairs], the column of positions that a pair follows
  int pairs;                  // channels from 2·pairs on are not turned
};

// Who does what: `rows` of two streams by `chunks` of heads; see norm_rope.h.
struct Sizes {
  int heads;        // A; 0 where there are only keys and values
  int kv_heads;     // A_kv
  int dim;          // D
  bool by_row;      // the norm runs over all heads of a row
  int64_t rows[2];  // of each stream
  int lanes;        // of a team
  int chunks;       // of the heads of a row
  int chunk_heads;  // in a chunk
};

struct Stream {
  Rows qkv;              // [rows, A + 2·A_kv, D]
  const float* q_norm;   // [D]; by_row [A·D]
  const float* k_norm;   // [D]; by_row [A_kv·D]
  const int64_t* joint;  // [rows], joint row of every row
};

struct JoinParams {
  Sizes sizes;
  Stream streams[2];
  Rope rope;
  Rows q;      // [S, A, D]
  KV context;  // where keys, turned, and values go
  KV pool;     // where keys before their rotation, and values, go too; data null: nowhere
  float eps;
};

struct AssembleParams {
  Sizes sizes;
  Rope rope;
  KV pool;     // read; [S] slots
  KV context;  // written; [S] slots
};

struct StreamGradients {
  Rows qkv;       // [rows, A + 2·A_kv, D]
  float* q_norm;  // [partial rows, D], contiguous; by_row [partial rows, A·D]
  float* k_norm;  // [partial rows, D], contiguous; by_row [partial rows, A_kv·D]
};

struct BackwardParams {
  Sizes sizes;
  Stream streams[2];
  StreamGradients gradients[2];
  Rope rope;
  Rows dq;  // [S, A, D]
  Rows dk;  // [S, A_kv, D]
  Rows dv;  // [S, A_kv, D]
  float eps;
};

// Each runs a whole operation on the CPU, on `threads` threads, or starts it on a GPU's stream; a GPU's return null or
// what went wrong.
void join_cpu(const JoinParams& params, DType dtype, int threads);
void assemble_cpu(const AssembleParams& params, DType dtype, int threads);
void backward_cpu(const BackwardParams& params, DType dtype, int threads);
const char* join_cuda(const JoinParams& params, DType dtype, int device, void* stream);
const char* assemble_cuda(const AssembleParams& params, DType dtype, int device, void* stream);
const char* backward_cuda(const BackwardParams& params, DType dtype, int device, void* stream);

}  // namespace lct
