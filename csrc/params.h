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

// A table of runs (see lct/plan.py): row i is (start, end, lo_0, hi_0, lo_1, hi_1, …), and empty beyond what there is.
struct RunTable {
  const int32_t* data;  // in the memory of the device that computes
  int runs;
  int width;

  // Always inlined, as everything that the tiles' file calls must be.
  __attribute__((always_inline)) const int32_t* operator[](int run) const { return data + int64_t(run) * width; }
  __attribute__((always_inline)) int intervals() const { return (width - 2) / 2; }
};

struct AttentionSizes {
  int64_t q_rows, k_rows;  // S, S_kv
  int heads, kv_heads;     // A, A_kv
  int dim;                 // D
  float scale;
};

struct AttentionForward {
  AttentionSizes sizes;
  RunTable runs;  // query rows and the key intervals that they see
  Rows q, k, v, out;
  float* lse;  // [A, S]
};

struct AttentionBackward {
  AttentionSizes sizes;
  RunTable runs;      // as in the forward
  RunTable key_runs;  // the transpose: key rows and the query intervals that see them
  Rows dout, q, k, v, out, dq, dk, dv;
  const float* lse;   // [A, S]
  const float* dlse;  // [A, S]
};

// Each runs a whole operation on the CPU, on `threads` threads, or starts it on a GPU's stream; a GPU's return null or
// what went wrong.
void join_cpu(const JoinParams& params, DType dtype, int threads);
void assemble_cpu(const AssembleParams& params, DType dtype, int threads);
void backward_cpu(const BackwardParams& params, DType dtype, int threads);
const char* join_cuda(const JoinParams& params, DType dtype, int device, void* stream);
const char* assemble_cuda(const AssembleParams& params, DType dtype, int device, void* stream);
const char* backward_cuda(const BackwardParams& params, DType dtype, int device, void* stream);
// fp16 or bf16, D = 64 or 128, on Hopper alone. `pairs`: blocks by twos share the keys and values that they copy.
const char* attention_forward_cuda(const AttentionForward& params, DType dtype, bool pairs, int device, void* stream);

}  // namespace lct
