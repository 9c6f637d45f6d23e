// Vectors over their stored scale, in groups and weighted, ready for the search (scale.cpp).
#pragma once

#include "kernels.h"

namespace kvfold {

// Those of tokens first..first+count-1 of one batch row and head, vectors [count][groups][dim]; their scales are stored.
void scaled_groups(const ScaleCall& call, int64_t b, int64_t g, int64_t first, int64_t count, float* vectors);

}  // namespace kvfold
