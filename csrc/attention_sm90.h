// What the Hopper kernels, their launches and their tests agree on: tiles and the order in which blocks take them, where
// matrices lie in shared memory, what a wgmma descriptor says of one, which element of a product a thread holds.
#pragma once

#include <cstdint>

#include "common.cuh"
#include "params.h"

namespace lct::sm90 {

constexpr int kRowBytes = 128;  // of shared memory: 64 channels of a half type, the span that is swizzled
constexpr int kSpan = 64;       // channels
constexpr int kWarps = 4;       // of a warpgroup
constexpr int kSharedBytes = 227 * 1024;  // that a block may ask for

// Registers of a thread that copies and of one that computes. Three warpgroups start with 168 each, and what one gives back
// another may take: 40 + 2 · 232 = 3 · 168. More than that would wait for ever.
constexpr int kCopierRegisters = 40, kConsumerRegisters = 232;
static_assert(kCopierRegisters + 2 * kConsumerRegisters <= 3 * (65536 / 384 / 8 * 8), "of the block's registers");

struct Tile {
  int run;    // row of the table; -1: there are no more
  int first;  // row
  int head;
};

// Tile `index`, of `size` rows: run by run as the table has them, those that see most first; within a run head by
// head, so that blocks that run together read the same keys and values.
HD Tile tile_at(const RunTable& table, int heads, int size, int index) {
  for (int run = 0; run < table.runs; ++run) {
    const int32_t* row = table.data + run * table.width;
    const int start = row[0], tiles = (row[1] - start + size - 1) / size;
    if (index < tiles * heads) return {run, start + index % tiles * size, index / tiles};
    index -= tiles * heads;
  }
  return {-1, 0, 0};
}

// No more tiles than this there can be, whatever the table: a launch's grid must not read it.
HD int most_tiles(int64_t rows, int runs, int heads, int size) { return int(rows / size + runs) * heads; }

// The key tiles that a run of the table sees, of `size` keys but for the last of each interval.
class KeyTiles {
 public:
  HD KeyTiles(const RunTable& table, int run, int size)
      : table_(table.data), size_(size), at_(run * table.width + 2), end_((run + 1) * table.width) {
    open();
  }
  HD bool more() const { return at_ < end_; }
  HD int first() const { return first_; }
  HD int count() const { return last_ - first_ < size_ ? last_ - first_ : size_; }
  HD void next() {
    first_ += size_;
    if (first_ >= last_) {
      at_ += 2;
      open();
    }
  }

 private:
  HD void open() {
    for (; at_ < end_; at_ += 2) {
      first_ = table_[at_];
      last_ = table_[at_ + 1];
      if (first_ < last_) return;
    }
  }

  const int32_t* const table_;
  const int size_;
  int at_, end_, first_ = 0, last_ = 0;
};

// Byte offset of (row, channel) in a matrix of half numbers as a copy with 128-byte swizzle writes it: span behind span,
// in each the 16-byte pieces of a row exchanged by the row's last three bits. The matrix begins at a multiple of 1024.
HD int swizzled(int rows, int row, int channel) {
  return channel / kSpan * rows * kRowBytes + row * kRowBytes + ((channel % kSpan / 8 ^ (row & 7)) << 4) + channel % 8 * 2;
}

// wgmma's descriptor of a matrix in shared memory with 128-byte swizzle. `between_eights`: bytes from eight rows to the
// next eight; `between_spans`: from 64 channels to the next 64, where channels are the product's columns.
HD uint64_t descriptor(uint32_t address, int between_spans, int between_eights) {
  const auto units = [](uint32_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
  return units(address) | units(between_spans) << 16 | units(between_eights) << 32 | uint64_t(1) << 62;
}

// The same so many bytes further on; nothing carries, because all of shared memory is below 2^18.
HD uint64_t further(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes >> 4); }

// A matrix as one of two factors whose channels are summed over, from a row of it on; and its channels [channel, + 16).
HD uint64_t by_channels(uint32_t matrix, int row) { return descriptor(matrix + row * kRowBytes, 0, 8 * kRowBytes); }
HD uint64_t at_channel(uint64_t matrix, int rows, int channel) {
  return further(matrix, channel / kSpan * rows * kRowBytes + channel % kSpan * 2);
}

// A matrix of `rows` as the second factor of a product that sums over them; and its rows [row, + 16).
HD uint64_t by_rows(uint32_t matrix, int rows) { return descriptor(matrix, rows * kRowBytes, 8 * kRowBytes); }
HD uint64_t at_row(uint64_t matrix, int row) { return further(matrix, row * kRowBytes); }

// Element i of the N / 2 that a thread of a warpgroup holds of a product [64, N].
HD int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
HD int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The forward's tiles. A block computes 64 queries in each of its consumer warpgroups.
template <int D>
struct ForwardShape {
  static constexpr int kConsumers = 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = D == 128 ? 176 : 128;
  static constexpr int kStages = D == 128 ? 2 : 4;  // of keys, and of values
  static constexpr int kThreads = 128 * (1 + kConsumers);
};

}  // namespace lct::sm90
