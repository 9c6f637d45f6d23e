// Keys back to where they stood before RoPE; the definition is ops/rope.py, `unrotate`. One pass over them, where PyTorch takes ten
// and as many pieces of fresh memory; sines serve all heads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace kvfold {
namespace {

constexpr int64_t kTokens = 64;  // of a piece of work

}  // namespace

void unrotate(const RopeCall& call) {
  const int64_t blocks = (call.tokens + kTokens - 1) / kTokens, pieces = call.batch * blocks, n = call.rotary, dim = call.dim;
  parallel_for(pieces < 2 * call.threads ? 1 : call.threads, pieces, [&](int64_t item) {
    const int64_t b = item / blocks, first = item % blocks * kTokens, last = std::min(call.tokens, first + kTokens);
    std::vector<float> sine(n), cosine(n);
    for (int64_t t = first; t < last; t++) {
      const float position = static_cast<float>(call.positions[b * call.positions_stride + t]), by = 1 / call.factor;
      for (int64_t i = 0; i < n; i++) sine_cosine(position * call.inv_freq[i], &sine[i], &cosine[i]);
      for (int64_t i = 0; i < n; i++) sine[i] *= by, cosine[i] *= by;
      for (int64_t g = 0; g < call.heads; g++) {
        const float* x = call.x + b * call.batch_stride + g * call.head_stride + t * call.token_stride;
        float* to = call.out + ((b * call.heads + g) * call.tokens + t) * dim;
        const int64_t step = call.interleaved ? 2 : 1, apart = call.interleaved ? 1 : n;
        for (int64_t i = 0; i < n; i++) {
          const float low = x[step * i], high = x[step * i + apart];
          to[step * i] = low * cosine[i] + high * sine[i];
          to[step * i + apart] = high * cosine[i] - low * sine[i];
        }
        std::copy(x + 2 * n, x + dim, to + 2 * n);
      }
    }
  });
}

}  // namespace kvfold
