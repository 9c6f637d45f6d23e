// Attention on codes and on exact keys and values; which way is taken depends on shapes alone.
#include "attend_amx.h"
#include "attend_step.h"
#include "attend_tiles.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvfold {
namespace {

constexpr int64_t kAlone = 1 << 17;  // products of a query and a key that one thread has done before another has begun

// `out` and `lse` of `rows` rows, of which others are of other keys: by log-sum-exp, as ops/merge.py.
void merge(const float* other, const float* other_lse, int64_t rows, int64_t dim, float* out, float* lse) {
  for (int64_t r = 0; r < rows; r++, other += dim, out += dim) {
    if (other_lse[r] == kMinusInfinity) continue;
    const float apart = lse[r] - other_lse[r];
    const float share = 1 / (1 + std::exp(apart));  // of the other
    for (int64_t d = 0; d < dim; d++) out[d] += share * (other[d] - out[d]);
    lse[r] = std::max(lse[r], other_lse[r]) + std::log1p(std::exp(-std::fabs(apart)));
  }
}

}  // namespace

void attend(const AttendCall& call) {
  if (attend_step(call)) return;
#if defined(__AMX_BF16__)
  if (amx_serves(call)) return attend_amx(call);
#endif
  attend_tiles(call);
}

void attend_too(const AttendCall& call, const AttendCall& before) {
  AttendCall own = call;
  const int64_t rows = own.batch * own.kv_heads * own.shared * own.queries;
  std::vector<float> out(rows * own.value.dim), lse(rows);
  own.out = out.data();
  own.lse = lse.data();
  if (rows * own.tokens * own.key.dim < kAlone) own.threads = 1;
  attend(own);
  merge(out.data(), lse.data(), rows, own.value.dim, before.out, before.lse);
}

}  // namespace kvfold
