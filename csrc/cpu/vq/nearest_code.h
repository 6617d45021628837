#pragma once

#include <stdint.h>

#include "cpu/vq/code_tree.h"
#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Queries come in packets of 16, one a lane, all finite: queries [num_packets][dim][16],
// ids [num_packets][16]. Distances are those of nearest_code's definition, bit for bit: float32,
// summed over d in order, every operation rounded; the lowest id wins among equal distances, and id
// 0 stands where no distance is below infinity.
struct NearestCode {
  // home [num_packets][16]: a leaf for each query to start from; near ones save work.
  void (*search)(const CodeTree& tree, const float* codebook, int64_t num_codes,
                 const float* queries, const int32_t* home, int32_t* ids, int64_t num_packets);
  void (*scan)(const float* codebook, int64_t num_codes, int dim, const float* queries,
               int32_t* ids, int64_t num_packets);
};

EMU3_KERNELS(NearestCode, nearest_code)

// z [batch, dim, places] with any strides (in elements), read as batch * places queries.
struct Queries {
  Dtype dtype;
  const void* data;
  int64_t places, batch_stride, dim_stride, place_stride;
};

// ids of queries begin..end into out[begin..end); tree_memory is null for a scan of all codes.
void find_nearest_codes(const Queries& z, const float* codebook, int64_t num_codes, int dim,
                        const void* tree_memory, int64_t begin, int64_t end, int64_t* out);

}  // namespace emu3
