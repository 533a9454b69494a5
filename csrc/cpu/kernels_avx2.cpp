// All kernels, compiled with this level's flags (setup.py). One unit a level instead of one an op: the inline
// vocabulary is shared and the namespace keeps every symbol apart.
#define PK_NS pk_avx2
#define PK_AVX2 1
#include "table_impl.h"

namespace pk {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = PK_KERNELS("avx2");
}  // namespace pk
