// Attention on codes and on exact keys and values; which way is taken depends on shapes alone.
#include "attend_amx.h"
#include "attend_step.h"
#include "attend_tiles.h"

namespace kvfold {

void attend(const AttendCall& call) {
  if (attend_step(call)) return;
#if defined(__AMX_BF16__)
  if (AmxAttention::serves(call)) return AmxAttention::run(call);
#endif
  attend_tiles(call);
}

}  // namespace kvfold
