// Attention over a plan's runs on the CPU, fp32. attention_tile.cpp computes one tile, once per instruction set;
// attention_cpu.cpp cuts an operation into tiles, spreads them over threads and picks the instruction set.
#pragma once

#include <cstdint>

#include "params.h"

namespace lct {

constexpr int kTile = 64;          // query rows, in the backward key rows, that stand in lanes together
constexpr int kForwardTiles = 4;   // such tiles that a task leads past the other side's rows: each is read once for all
constexpr int kBackwardTiles = 2;
constexpr int kBlock = 128;        // rows of the other side that are looked at together
constexpr int kMaxDim = 256;

// Where some key rows add their gradient of the queries that see them, from row `first` on, heads of a group. On a
// boundary of 64 bytes, its strides too, with room for whole vectors of channels.
struct PartialDq {
  float* data;
  int64_t first, rows;
  int64_t row, head;  // strides
};

// What an instruction set computes. `scratch` begins on a boundary of 64 bytes.
struct TileKernels {
  const char* name;
  int lanes;  // floats in a vector
  int64_t (*forward_floats)(int dim);  // of scratch
  int64_t (*backward_floats)(int dim);
  // out and lse of `count` ≤ kForwardTiles · kTile query rows of one head, which see what `run` says.
  void (*forward)(const AttentionForward& p, const int32_t* run, int64_t first, int count, int head, float* scratch);
  // dk and dv of `count` ≤ kBackwardTiles · kTile key rows of one key head, seen by what `run` says; adds to dq.
  void (*backward)(const AttentionBackward& p, const float* delta, const int32_t* run, int64_t first, int count,
                   int kv_head, const PartialDq& dq, float* scratch);
  // δ[r] = Σ_d dout · out − dlse of `count` query rows of one head.
  void (*delta)(const AttentionBackward& p, int64_t first, int count, int head, float* delta);
};

extern const TileKernels kPortableTile;
#ifdef LCT_X86
extern const TileKernels kAvx2Tile, kAvx512Tile;
#endif

// `isa`: a name of `attention_isas`, or empty for the fastest; false where it is neither.
bool attention_forward_cpu(const AttentionForward& p, const char* isa, int threads);
bool attention_backward_cpu(const AttentionBackward& p, const char* isa, int threads);
// Those that this processor runs, fastest first, separated by spaces.
const char* attention_isas();

}  // namespace lct
