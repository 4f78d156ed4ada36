// The index arithmetic of the Hopper kernels, for the GPU and for the tests: which tile a block computes, where a matrix
// lies in shared memory, what a wgmma descriptor says of it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LCT_HD __host__ __device__ __forceinline__
#else
#define LCT_HD inline
#endif

namespace lct::sm90 {

constexpr int kQueries = 128;  // of a tile: 64 for each of two consumer warpgroups
constexpr int kKeys = 128;     // of a tile
constexpr int kRowBytes = 128;  // of a shared-memory row: 64 channels of a half type, one swizzle span

// A row of a plan's table: queries [start, end), then intervals of keys.
struct Run {
  const int32_t* row;
  LCT_HD int start() const { return row[0]; }
  LCT_HD int end() const { return row[1]; }
  LCT_HD int first(int i) const { return row[2 + 2 * i]; }
  LCT_HD int last(int i) const { return row[3 + 2 * i]; }
};

struct Tile {
  int run;    // row of the table; -1: there is no such tile
  int query;  // first query row
  int head;
};

LCT_HD int tiles_of(int rows, int size) { return (rows + size - 1) / size; }

// Tile `index` in the order in which they are handed out: run by run as the table has them, those that see most first;
// within a run head by head, so that neighbouring blocks read the same keys and values.
LCT_HD Tile tile_at(const int32_t* table, int rows, int width, int heads, int64_t index) {
  for (int r = 0; r < rows; ++r) {
    const Run run{table + int64_t(r) * width};
    const int64_t tiles = tiles_of(run.end() - run.start(), kQueries);
    if (index < tiles * heads) {
      return {r, run.start() + int(index % tiles) * kQueries, int(index / tiles)};
    }
    index -= tiles * heads;
  }
  return {-1, 0, 0};
}

LCT_HD int64_t tile_count(const int32_t* table, int rows, int width, int heads) {
  int64_t count = 0;
  for (int r = 0; r < rows; ++r) {
    const Run run{table + int64_t(r) * width};
    count += int64_t(tiles_of(run.end() - run.start(), kQueries)) * heads;
  }
  return count;
}

// Byte offset of (row, channel) in a matrix of half numbers that TMA wrote with 128-byte swizzle, in spans of 64
// channels, one span behind the other: 16-byte chunks of a row are exchanged by the row's last three bits.
LCT_HD int swizzled(int row, int channel, int rows) {
  const int span = channel / 64, chunk = channel % 64 / 8, within = channel % 8 * 2;
  return span * rows * kRowBytes + row * kRowBytes + ((chunk ^ (row & 7)) << 4) + within;
}

// Descriptor of a matrix for wgmma: address, leading and stride offsets in units of 16 bytes, 128-byte swizzle.
// K-major (queries, keys): eight rows are 1024 bytes apart. MN-major (values): groups of eight rows of keys are 1024
// bytes apart, spans of 64 channels `leading` bytes.
LCT_HD uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  uint64_t bits = 0;
  bits |= uint64_t((address & 0x3FFFF) >> 4);
  bits |= uint64_t((leading & 0x3FFFF) >> 4) << 16;
  bits |= uint64_t((stride & 0x3FFFF) >> 4) << 32;
  bits |= uint64_t(1) << 62;
  return bits;
}

}  // namespace lct::sm90
