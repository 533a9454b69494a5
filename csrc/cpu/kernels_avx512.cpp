// All kernels, compiled with this level's flags (setup.py). One unit a level instead of one an op: the inline
// vocabulary is shared and the namespace keeps every symbol apart.
#define PK_NS pk_avx512
#define PK_AVX512 1
#include "table_impl.h"

namespace pk {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = PK_KERNELS("avx512");
}  // namespace pk
