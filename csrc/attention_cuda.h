// Attention on Hopper: what ffi.cpp starts.
#pragma once

#include "attention_cpu.h"

namespace lct {

// Starts the forward on a GPU's stream: fp16 or bf16, D = 64 or 128, the table of runs in that GPU's memory, `out` dense.
// `pairs`: blocks by twos share what they copy. Null, or what went wrong.
const char* attention_forward_cuda(const AttentionForward& p, DType dtype, bool pairs, int device, void* stream);

}  // namespace lct
