// What is compiled for the device only, on the host: a library with the functions of the host library, by the branches
// of the device, and those of the device library, whose launches are simulated. LAUNCH_CU and LETTERBOX_CU are the
// launchers, where `kernel<<<...>>>(...)` has become simulate(kernel, ...).
#include "cuda_stand_ins.h"
//
#include "check.cpp"
#include "device_api.cpp"
#include "host_api.cpp"
#undef RF_EXPORT
#include LAUNCH_CU
#include LETTERBOX_CU
#include "letterbox_host.cpp"

// How many 16-byte accesses there were since the last call: aligned ones, and others.
extern "C" __attribute__((visibility("default"))) void counted(int64_t* both) {
  both[0] = aligned;
  both[1] = misaligned;
  aligned = misaligned = 0;
}
