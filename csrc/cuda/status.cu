// Status codes into words.
#include "../checks.h"
#include "launch.h"

extern "C" {

const char* pk_cuda_status_string(int status) {
  if (status == PK_ERR_CUDA) return "the CUDA runtime reported an error";
  if (status == PK_ERR_ARCH) return "this device's architecture lacks what the call needs";
  return pk::status_text(status);
}
const char* pk_cuda_error_text(void) { return pk::last_error_text; }
int pk_cuda_abi_version(void) { return PEFTKERN_CUDA_ABI_VERSION; }
int pk_cuda_versions(int* driver, int* runtime) {
  if (!driver || !runtime) return PK_ERR_NULL;
  if (int bad = pk::checked(cudaDriverGetVersion(driver))) return bad;
  return pk::checked(cudaRuntimeGetVersion(runtime));
}

}  // extern "C"
