/* The part of CUDA's runtime that autograd asks about devices, streams and events, and the part of its driver that
   Triton starts kernels with, for one GPU that is not there. Loaded before libcudart (LD_PRELOAD), it lets C++ code
   record and run backward passes of fake tensors, and Triton launch what it has compiled. Nothing is computed. */

#include <string.h>

typedef int status; /* cudaError_t, CUresult; 0 is success */

status cudaGetDeviceCount(int* count) { return *count = 1, 0; }
status cudaGetDevice(int* device) { return *device = 0, 0; }
status cudaSetDevice(int device) { return (void)device, 0; }
status cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, 0; }
status cudaDriverGetVersion(int* version) { return *version = 13000, 0; }
status cudaGetLastError(void) { return 0; }

status cudaStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  static char streams[4096];
  static int used = 0;
  (void)flags, (void)priority;
  *stream = streams + __atomic_fetch_add(&used, 1, __ATOMIC_RELAXED) % 4096;
  return 0;
}
status cudaStreamQuery(void* stream) { return (void)stream, 0; }
status cudaStreamSynchronize(void* stream) { return (void)stream, 0; }
status cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return (void)stream, (void)event, (void)flags, 0; }
status cudaStreamIsCapturing(void* stream, int* capturing) { return (void)stream, *capturing = 0, 0; }

status cudaEventCreateWithFlags(void** event, unsigned flags) {
  static char one;
  return (void)flags, *event = &one, 0;
}
status cudaEventRecord(void* event, void* stream) { return (void)event, (void)stream, 0; }
status cudaEventQuery(void* event) { return (void)event, 0; }
status cudaEventSynchronize(void* event) { return (void)event, 0; }
status cudaEventDestroy(void* event) { return (void)event, 0; }
status cudaDeviceSynchronize(void) { return 0; }

/* of libcuda.so.1, whose name the library has: devices have a context */
status cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  return (void)device, *flags = 0, *active = 1, 0;
}

/* The driver, as Triton calls it. A function is its name; the last launch is kept. */

static struct {
  long count;
  const char* name;
  unsigned grid;
  void* arguments[8]; /* the first ones, tensors' */
} last;

long launch_count(void) { return last.count; }
const char* launch_name(void) { return last.name; }
unsigned launch_grid(void) { return last.grid; }
void* launch_argument(int number) { return last.arguments[number]; }

status cuLaunchKernelEx(const unsigned* config, void* function, void** arguments, void** extra) {
  (void)extra, last.count++, last.name = function, last.grid = config[0];
  for (int i = 0; i < 8; i++) last.arguments[i] = *(void**)arguments[i];
  return 0;
}
status cuModuleLoadData(void** module, const void* image) { return (void)image, *module = (void*)"module", 0; }
status cuModuleUnload(void* module) { return (void)module, 0; }
status cuModuleGetFunction(void** function, void* module, const char* name) {
  return (void)module, *function = strdup(name), 0;
}
status cuFuncGetAttribute(int* value, int attribute, void* function) {
  return (void)function, *value = attribute == 0 ? 1024 : 0, 0; /* threads of a block at most */
}
status cuFuncSetAttribute(void* function, int attribute, int value) {
  return (void)function, (void)attribute, (void)value, 0;
}
status cuFuncSetCacheConfig(void* function, int config) { return (void)function, (void)config, 0; }
status cuInit(unsigned flags) { return (void)flags, 0; }
status cuDeviceGet(int* device, int index) { return *device = index, 0; }
status cuDeviceGetCount(int* count) { return *count = 1, 0; }
status cuDeviceGetAttribute(int* value, int attribute, int device) {
  return (void)device, *value = attribute == 97 ? 227 << 10 : 1 << 16, 0; /* shared memory of a block at most */
}
status cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, *context = (void*)"context", 0; }
status cuCtxGetCurrent(void** context) { return *context = (void*)"context", 0; }
status cuCtxSetCurrent(void* context) { return (void)context, 0; }
status cuCtxGetDevice(int* device) { return *device = 0, 0; }
status cuCtxGetLimit(unsigned long* value, int limit) { return (void)limit, *value = 1 << 20, 0; }
status cuCtxSetLimit(int limit, unsigned long value) { return (void)limit, (void)value, 0; }
status cuDriverGetVersion(int* version) { return *version = 13000, 0; }
status cuGetErrorString(int error, const char** text) { return (void)error, *text = "none", 0; }
status cuPointerGetAttribute(void** value, int attribute, void* pointer) { return (void)attribute, *value = pointer, 0; }
status cuPointerGetAttributes(unsigned count, int* attributes, void*** values, void* pointer) {
  for (unsigned i = 0; i < count; i++) *values[i] = pointer;
  return (void)attributes, 0;
}
