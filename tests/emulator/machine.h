// A Hopper GPU for a few blocks, on one CPU thread, that promises what the instruction set does and no more. Everything
// that may happen late happens late by chance, drawn from a seed:
//
//   threads     each is a fiber; warps run in a random order
//   copies      arrive at any time after they were started, in any order
//   products    are computed at any time between their commit and the wait for them, from what shared memory and the
//               registers of their first factor hold then
//
// so that a stage that is given back too early, a wait that is missing or a phase that is wrong changes results. What
// would hang a GPU, what has no defined result and what an instruction does not take ends the run with a sentence.
// Registers of accumulators that are read before the wait, and the timing of anything, are not modelled.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common.cuh"

namespace lct::sm90 {
namespace emulated {

constexpr uint32_t kBase = 4096;     // where a block's shared memory begins: no address is 0
constexpr int kStack = 96 * 1024;
constexpr uint16_t kNothing = 0x7fc1;  // a NaN, in memory that nobody wrote

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Barrier {  // as it lies in the 8 bytes of shared memory
  int32_t bytes;
  uint16_t arrivals : 15, parity : 1;
  uint8_t expected, magic;
};
static_assert(sizeof(Barrier) == 8, "");

struct Product {
  float* d;
  int columns;
  const uint32_t* a_registers;  // null: a is in shared memory
  uint64_t a, b;
  bool add, is_bfloat;
};

struct Block;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int index;
  bool done = false;
  std::function<bool()> ready;  // empty: runs
  const char* waits_for = "";
  std::vector<std::vector<Product>> groups;  // committed, not yet computed; the last is open
  int in_flight = 0;                         // groups committed
  int registers = 0;
  std::vector<uint32_t> stored;              // 16-byte pieces of shared memory, before a fence
};

struct Warp {
  int arrived = 0;
  int64_t round = 0;
  float exchanged[2][32];
};

struct Named {
  int arrived = 0, threads = 0;
  int64_t round = 0;
};

struct Block {
  int index, rank;
  int running;    // threads
  int registers;  // that nobody has
  std::vector<uint8_t> memory;
  std::vector<int> unfenced;  // of every 16 bytes: stores without a fence behind them
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Named named[17];  // 16: the whole block
  std::vector<Block*> cluster;
  Named* cluster_barrier;
};

class Machine {
 public:
  explicit Machine(uint64_t seed) : random_(seed), eagerness_(seed % 3), slowness_(seed / 2 % 2 ? 1000 : 3) {}

  void run(int blocks, int cluster, int threads, size_t bytes, const std::function<void(uint8_t*)>& body);

  Thread& current() { return *current_; }
  int blocks() const { return int(blocks_.size()); }

  bool chance(int of) { return random_() % of == 0; }

  // Suspends the current thread until `ready`.
  void wait(const char* what, std::function<bool()> ready) {
    if (ready()) return;
    current_->ready = std::move(ready);
    current_->waits_for = what;
    swapcontext(&current_->context, &scheduler_);
    if (stop_) throw Stopped{};
  }

  // Others may run for a while.
  void pause() {
    if (chance(2)) wait("nothing", [this, left = int(random_() % 8)]() mutable {
      moved_ = true;
      return left-- <= 0;
    });
  }

  // All 32 lanes; the last one does `act`, then all go on.
  void gather(const char* what, const std::function<void()>& act = {}) {
    Thread& t = *current_;
    Warp& warp = t.block->warps[t.index / 32];
    const int64_t round = warp.round;
    if (++warp.arrived == 32) {
      if (act) act();
      warp.arrived = 0;
      ++warp.round;
    } else {
      wait(what, [&warp, round] { return warp.round != round; });
    }
  }

  void meet(const char* what, Named& named, int threads, bool stay) {
    if (named.arrived && named.threads != threads) fail(std::string(what) + ": threads disagree on how many come");
    named.threads = threads;
    const int64_t round = named.round;
    if (++named.arrived == threads) {
      named.arrived = 0;
      ++named.round;
    } else if (stay) {
      wait(what, [&named, round] { return named.round != round; });
    }
  }

  Barrier& barrier(Block& block, uint32_t address) {
    Barrier& found = *reinterpret_cast<Barrier*>(at(block, address, 8));
    if (found.magic != 0xba) fail("a barrier is used before it is initialised");
    return found;
  }

  static void settle(Barrier& b) {
    if (b.arrivals || b.bytes) return;
    b.parity ^= 1;
    b.arrivals = b.expected;
  }

  void arrive(Block& block, uint32_t address) {
    if (!block.running) fail("a thread arrives at a barrier of a block that has ended");
    Barrier& b = barrier(block, address);
    if (!b.arrivals) fail("more threads arrive at a barrier than it was initialised with");
    b.arrivals -= 1;
    settle(b);
  }

  uint8_t* at(Block& block, uint32_t address, size_t bytes) {
    if (address < kBase || address - kBase + bytes > block.memory.size()) fail("an address outside of shared memory");
    return block.memory.data() + (address - kBase);
  }

  uint16_t number(Block& block, uint32_t address) {
    uint16_t bits;
    memcpy(&bits, fenced(block, address, 2), 2);
    return bits;
  }

  // What happens some time later.
  void start(std::function<void()> copy) { copies_.push_back(std::move(copy)); }

  // Copies and products see what threads stored only behind a fence.
  uint8_t* fenced(Block& block, uint32_t address, size_t bytes) {
    for (uint32_t piece = (address - kBase) / 16; piece <= (address - kBase + bytes - 1) / 16; ++piece)
      if (block.unfenced.at(piece)) fail("a copy or product meets what a thread stored and did not fence");
    return at(block, address, bytes);
  }

  void arrived(Block& block, uint32_t address, int bytes) {
    Barrier& b = barrier(block, address);
    b.bytes -= bytes;
    settle(b);
  }

  void compute(Block& block, int warp, int keep) {
    Thread* lanes = &block.threads[32 * warp];
    while (lanes->in_flight > keep) {
      for (size_t i = 0; i < lanes->groups.front().size(); ++i) compute_one(block, lanes, i);
      for (int lane = 0; lane < 32; ++lane) {
        lanes[lane].groups.erase(lanes[lane].groups.begin());
        lanes[lane].in_flight -= 1;
      }
    }
  }

  bool eager() { return eagerness_ == 0 ? false : eagerness_ == 1 ? true : chance(2); }

 private:
  struct Stopped {};

  static float value(uint16_t bits, bool is_bfloat) { return is_bfloat ? widen(BFloat{bits}) : widen(Half{bits}); }

  // Where a 128-byte swizzled matrix has an element: the address' bits 4 to 6 are exchanged by its bits 7 to 9.
  static uint32_t place(uint64_t descriptor, int row, int column, bool by_rows) {
    if (descriptor >> 62 != 1) fail("a descriptor without 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, spans = (descriptor >> 16 & 0x3fff) << 4,
                   eights = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t address = start + row / 8 * eights + row % 8 * 128 +
                             (by_rows ? column / 64 * spans + column % 64 * 2 : uint32_t(column) * 2);
    return address ^ (address >> 7 & 7) << 4;
  }

  void compute_one(Block& block, Thread* lanes, size_t i) {
    const auto product = [&](int lane) -> const Product& { return lanes[lane].groups.front()[i]; };
    const Product first = product(0);
    const int first_row = lanes->index % 128 / 32 * 16;
    float a[16][16];
    for (int lane = 0; lane < 32; ++lane) {
      const Product& mine = product(lane);
      if (mine.columns != first.columns || mine.a != first.a || mine.b != first.b || mine.add != first.add)
        fail("the threads of a warp start different products");
      for (int part = 0; part < 4; ++part)
        for (int low = 0; low < 2; ++low) {
          const int row = lane / 4 + part % 2 * 8, column = lane % 4 * 2 + part / 2 * 8 + low;
          const uint16_t bits = mine.a_registers ? uint16_t(mine.a_registers[part] >> 16 * low)
                                                 : number(block, place(mine.a, first_row + row, column, false));
          a[row][column] = value(bits, mine.is_bfloat);
        }
    }
    std::vector<float> b(16 * first.columns);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < first.columns; ++n) {
        const bool by_rows = first.a_registers;
        const uint32_t address = by_rows ? place(first.b, k, n, true) : place(first.b, n, k, false);
        b[k * first.columns + n] = value(number(block, address), first.is_bfloat);
      }
    std::vector<float> sums(first.columns);
    for (int row = 0; row < 16; ++row) {
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < first.columns; ++n) sums[n] += a[row][k] * b[k * first.columns + n];
      for (int n = 0; n < first.columns; ++n) {
        float& d = product(row % 8 * 4 + n % 8 / 2).d[n / 8 * 4 + row / 8 * 2 + n % 2];
        d = sums[n] + (first.add ? d : 0.f);
      }
    }
  }

  void finish(size_t which) {
    const auto copy = std::move(copies_[which]);
    copies_.erase(copies_.begin() + which);
    moved_ = true;
    copy();
  }

  static void enter(unsigned high, unsigned low) {
    auto* machine = reinterpret_cast<Machine*>(uint64_t(high) << 32 | low);
    Thread& t = *machine->current_;
    try {
      (*machine->body_)(t.block->memory.data());
    } catch (const Stopped&) {
    } catch (const std::exception& error) {
      if (machine->error_.empty()) machine->error_ = error.what();
    }
    t.done = true;
    t.block->running -= 1;
    swapcontext(&t.context, &machine->scheduler_);
  }

  void resume(Thread& t) {
    current_ = &t;
    t.ready = nullptr;
    swapcontext(&scheduler_, &t.context);
  }

  void check_end() {
    for (Block& block : blocks_) {
      for (Thread& t : block.threads)
        if (t.in_flight) fail("a thread ends before its products are done");
    }
    if (!copies_.empty()) fail("a block ends before its copies have arrived");
  }

  std::mt19937_64 random_;
  const int eagerness_, slowness_;  // of products, of copies
  std::vector<Block> blocks_;
  std::vector<Named> clusters_;
  std::vector<std::function<void()>> copies_;
  Thread* current_ = nullptr;
  ucontext_t scheduler_;
  const std::function<void(uint8_t*)>* body_ = nullptr;
  std::string error_;
  bool stop_ = false, moved_ = false;
};

inline Machine*& machine() {
  static Machine* current = nullptr;
  return current;
}

inline void Machine::run(int blocks, int cluster, int threads, size_t bytes,
                         const std::function<void(uint8_t*)>& body) {
  machine() = this;
  body_ = &body;
  blocks_.resize(blocks);
  clusters_.resize(blocks / cluster);
  const uint64_t self = reinterpret_cast<uint64_t>(this);
  std::vector<std::pair<Block*, int>> warps;
  for (int i = 0; i < blocks; ++i) {
    Block& block = blocks_[i];
    block.index = i;
    block.rank = i % cluster;
    block.memory.resize(bytes);
    for (size_t at = 0; at + 1 < bytes; at += 2) memcpy(&block.memory[at], &kNothing, 2);
    block.unfenced.resize(bytes / 16 + 1);
    block.warps.resize(threads / 32);
    block.cluster_barrier = &clusters_[i / cluster];
    for (int other = 0; other < cluster; ++other) block.cluster.push_back(&blocks_[i / cluster * cluster + other]);
    block.threads.resize(threads);
    block.running = threads;
    block.registers = 0;  // all are handed out at the start, in eights
    for (int index = 0; index < threads; ++index) {
      Thread& t = block.threads[index];
      t.block = &block;
      t.index = index;
      t.registers = 65536 / threads / 8 * 8;
      t.groups.resize(1);
      t.stack.reset(new char[kStack]);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = nullptr;
      makecontext(&t.context, reinterpret_cast<void (*)()>(enter), 2, unsigned(self >> 32), unsigned(self));
    }
    for (int warp = 0; warp < threads / 32; ++warp) warps.emplace_back(&block, warp);
  }
  bool left = true;
  while (left && error_.empty()) {
    left = false;
    moved_ = false;
    std::shuffle(warps.begin(), warps.end(), random_);
    for (auto& [block, warp] : warps) {
      if (chance(4)) {  // a warp may be kept waiting
        for (int lane = 0; lane < 32; ++lane) left = left || !block->threads[32 * warp + lane].done;
        moved_ = true;
        continue;
      }
      for (bool again = true; again && error_.empty();) {
        again = false;
        for (int lane = 0; lane < 32 && error_.empty(); ++lane) {
          Thread& t = block->threads[32 * warp + lane];
          if (t.done || (t.ready && !t.ready())) continue;
          resume(t);
          again = moved_ = true;
        }
      }
      for (int lane = 0; lane < 32; ++lane) left = left || !block->threads[32 * warp + lane].done;
      while (!copies_.empty() && chance(slowness_)) finish(random_() % copies_.size());
    }
    if (!moved_ && left && error_.empty()) {
      if (!copies_.empty()) {
        finish(random_() % copies_.size());
      } else {
        error_ = "every thread waits:";
        for (auto& [block, warp] : warps) {
          const Thread& t = block->threads[32 * warp];
          if (!t.done)
            error_ += " block " + std::to_string(block->index) + " warp " + std::to_string(warp) + " for " + t.waits_for + ";";
        }
      }
    }
  }
  stop_ = true;  // threads that still wait leave by an exception, so that what they hold is freed
  for (Block& block : blocks_)
    for (Thread& t : block.threads)
      if (!t.done && !t.waits_for[0]) t.done = true;
      else if (!t.done) resume(t);
  machine() = nullptr;
  if (error_.empty()) check_end();
  if (!error_.empty()) fail(error_);
}

inline Machine& now() { return *machine(); }
inline Thread& self() { return machine()->current(); }

inline uint32_t address_of(const void* pointer) {
  return kBase + uint32_t(static_cast<const uint8_t*>(pointer) - self().block->memory.data());
}

}  // namespace emulated

}  // namespace lct::sm90
