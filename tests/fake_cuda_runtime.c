/* The part of CUDA's runtime that autograd asks about devices, streams and events, for one GPU that is not there. Loaded
   before libcudart (LD_PRELOAD), it lets C++ code record and run backward passes of fake tensors. Nothing is computed. */

typedef int status; /* cudaError_t; 0 is success */

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
