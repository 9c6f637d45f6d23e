// Keys back to where they stood before RoPE (rope.h). One pass over them, where PyTorch takes ten and as many pieces of fresh memory;
// sines serve all heads.
#include "rope.h"

#include <vector>

#include "pool.h"

namespace kvfold {
namespace {

constexpr int64_t kTokens = 64;  // of a piece of work

}  // namespace

void unrotate(const RopeCall& call) {
  const int64_t blocks = (call.tokens + kTokens - 1) / kTokens, pieces = call.batch * blocks;
  parallel_for(pieces < 2 * call.threads ? 1 : call.threads, pieces, [&](int64_t item) {
    const int64_t b = item / blocks, first = item % blocks * kTokens, last = std::min(call.tokens, first + kTokens);
    std::vector<float> sines(2 * call.turn.rotary);
    for (int64_t t = first; t < last; t++) {
      sines_of(call.turn, b, t, sines.data());
      for (int64_t g = 0; g < call.heads; g++)
        turn_back(call.turn, sines.data(), call.x + b * call.batch_stride + g * call.head_stride + t * call.token_stride, call.dim,
                  call.out + ((b * call.heads + g) * call.tokens + t) * call.dim);
    }
  });
}

}  // namespace kvfold
