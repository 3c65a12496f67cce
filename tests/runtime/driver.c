/* Stands for NVIDIA's driver: says on standard output what it is asked to do, and does nothing.

   cuda.bindings asks for functions by name; those that are not here succeed. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#undef cuGetProcAddress

#define SAY(...) (printf(__VA_ARGS__), fflush(stdout), CUDA_SUCCESS)
static int capturing;

CUresult stand_cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult stand_cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult stand_cuDeviceGet(CUdevice *device, int index) { *device = index; return CUDA_SUCCESS; }
CUresult stand_cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 << 10 : 9;
  return CUDA_SUCCESS;
}
CUresult stand_cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)0x10;
  return CUDA_SUCCESS;
}
CUresult stand_cuCtxGetCurrent(CUcontext *context) { return stand_cuDevicePrimaryCtxRetain(context, 0); }
CUresult stand_cuCtxGetDevice(CUdevice *device) { return stand_cuDeviceGet(device, 0); }
CUresult stand_cuLibraryLoadData(CUlibrary *library, const void *code) {
  *library = (CUlibrary)0x20;
  return SAY("load %s\n", (const char *)code);
}
CUresult stand_cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  *kernel = (CUkernel)0x30;
  return SAY("kernel %s\n", name);
}
CUresult stand_cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel, CUdevice device) {
  if (value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
  return SAY("attribute %d of %p: %d\n", which, (void *)kernel, value);
}
CUresult stand_cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction kernel, void **params, void **extra) {
  SAY("%s %p on %p: grid %u %u %u block %u %u %u shared %u", capturing ? "capture" : "launch", (void *)kernel,
      (void *)how->hStream, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY,
      how->blockDimZ, how->sharedMemBytes);
  for (int i = 0; i < 3; i++) SAY(" %llx", *(unsigned long long *)params[i]);
  for (unsigned i = 0; i < how->numAttrs; i++)
    if (how->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      SAY(" early %d", how->attrs[i].value.programmaticStreamSerializationAllowed);
  SAY("\n");
  return getenv("LAUNCHES_FAIL") ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}
CUresult stand_cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  capturing = 1;
  return CUDA_SUCCESS;
}
CUresult stand_cuStreamGetCaptureInfo(
    CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
    const CUgraphNode **nodes, const void **edges, size_t *count) {
  if (status) *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  if (graph) *graph = (CUgraph)0x40;
  return CUDA_SUCCESS;
}
CUresult stand_cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  capturing = 0;
  if (graph) *graph = (CUgraph)0x40;
  return CUDA_SUCCESS;
}
CUresult stand_cuGraphInstantiateWithParams(CUgraphExec *made, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *how) {
  *made = (CUgraphExec)0x50;
  how->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
  return CUDA_SUCCESS;
}
CUresult stand_cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  return SAY("replay %p on %p\n", (void *)graph, (void *)stream);
}
CUresult stand_cuStreamDestroy(CUstream stream) { return SAY("destroy %p\n", (void *)stream); }
CUresult stand_cuGetErrorName(CUresult error, const char **name) { *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return CUDA_SUCCESS; }
CUresult stand_cuGetErrorString(CUresult error, const char **text) { *text = "an illegal address"; return CUDA_SUCCESS; }

static CUresult nothing(void) { return CUDA_SUCCESS; }

CUresult cuGetProcAddress_v2(
    const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
  char ours[128];
  snprintf(ours, sizeof ours, "stand_%s", name);
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), ours);
  if (!*function) *function = (void *)nothing;
  if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
