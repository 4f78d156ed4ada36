// The bodies of norm_rope.h on the CPU: blocks in turn, the teams of a block in turn, a team's lanes in turn.
#include <algorithm>

#include "norm_rope.h"
#include "threads.h"

namespace lct {
namespace {

constexpr int64_t kThreadElements = 1 << 17;  // below it a thread costs more than it saves

// Threads share no block, so that what a block writes does not depend on how many there are.
template <class Body>
void each_block(const Sizes& sizes, int threads, Body body) {
  const int64_t blocks = blocks_of(sizes) * sizes.chunks;
  const int64_t elements = (sizes.rows[0] + sizes.rows[1]) * (sizes.heads + 2 * sizes.kv_heads) * sizes.dim;
  const int64_t parts = std::clamp<int64_t>(std::min(elements / kThreadElements, blocks), 1, std::max(threads, 1));
  parallel(parts, threads, [&](int64_t part) {
    for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i)
      for (int team = 0; team < teams_of(sizes); ++team)
        body(HostTeam(sizes.lanes, sizes.dim / kChannels, team), i / sizes.chunks, int(i % sizes.chunks));
  });
}

}  // namespace

void join_cpu(const JoinParams& p, DType dtype, int threads) {
  each_block(p.sizes, threads, [&](const HostTeam& team, int64_t block, int chunk) {
    if (dtype == DType::fp16) join_body<Half>(team, p, block, chunk);
    if (dtype == DType::bf16) join_body<BFloat>(team, p, block, chunk);
    if (dtype == DType::fp32) join_body<float>(team, p, block, chunk);
  });
}

void assemble_cpu(const AssembleParams& p, DType dtype, int threads) {
  each_block(p.sizes, threads, [&](const HostTeam& team, int64_t block, int chunk) {
    if (dtype == DType::fp16) assemble_body<Half>(team, p, block, chunk);
    if (dtype == DType::bf16) assemble_body<BFloat>(team, p, block, chunk);
    if (dtype == DType::fp32) assemble_body<float>(team, p, block, chunk);
  });
}

void backward_cpu(const BackwardParams& p, DType dtype, int threads) {
  each_block(p.sizes, threads, [&](const HostTeam& team, int64_t block, int chunk) {
    if (dtype == DType::fp16) backward_body<Half>(team, p, block, chunk);
    if (dtype == DType::bf16) backward_body<BFloat>(team, p, block, chunk);
    if (dtype == DType::fp32) backward_body<float>(team, p, block, chunk);
  });
}

}  // namespace lct
