// All kernels, compiled with this level's flags (setup.py). One unit a level instead of one an op: the inline
// vocabulary is shared and the namespace keeps every symbol apart.
#define PK_NS pk_baseline
#include "table_impl.h"

namespace pk {
extern const Kernels kernels_baseline;
const Kernels kernels_baseline = PK_KERNELS("baseline");
}  // namespace pk
