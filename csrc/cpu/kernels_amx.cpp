// All kernels, compiled with this level's flags (setup.py). One unit a level instead of one an op: the inline
// vocabulary is shared and the namespace keeps every symbol apart.
#define PK_NS pk_amx
#define PK_AVX512 1
#define PK_AVX512BF16 1
#define PK_AMX 1
#include "table_impl.h"

namespace pk {
extern const Kernels kernels_amx;
const Kernels kernels_amx = PK_KERNELS("amx");
}  // namespace pk
