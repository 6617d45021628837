#pragma once

#include <stdint.h>

#include "cpu/vq/code_tree.h"
#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Queries are packed 16 to a packet, one per lane, all finite: queries [num_packets][dim][16],
// ids [num_packets][16]. Distances equal those of the reference bit for bit: float32, summed over d
// in order, every operation rounded. Among equal distances the lowest id is returned, and id 0 if
// no distance is finite.
struct NearestCode {
  // home [num_packets][16]: the leaf at which the search for each query starts; a near one saves
  // work.
  void (*search)(const CodeTree& tree, const float* codebook, int64_t num_codes,
                 const float* queries, const int32_t* home, int32_t* ids, int64_t num_packets);
  void (*scan)(const float* codebook, int64_t num_codes, int dim, const float* queries,
               int32_t* ids, int64_t num_packets);
};

EMU3_KERNELS(NearestCode, nearest_code)

// z [batch, dim, positions] with any strides (in elements): batch * positions queries.
struct Queries {
  Dtype dtype;
  const void* data;
  int64_t positions, batch_stride, dim_stride, position_stride;
};

// Writes the ids of queries [begin, end) to out[begin, end). Scans all codes if tree_memory is
// null.
void find_nearest_codes(const Queries& z, const float* codebook, int64_t num_codes, int dim,
                        const void* tree_memory, int64_t begin, int64_t end, int64_t* out);

}  // namespace emu3
