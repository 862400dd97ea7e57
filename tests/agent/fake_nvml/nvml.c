/* A libnvidia-ml.so.1 that says what a text file says, as it stands at every call: see fake_gpus.py.
 *
 * Lines of the file are `key value`; a GPU's keys are `N.key`. Compiled with -DOLD_DRIVER it lacks the symbols that
 * drivers got later.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { long index; } device_t;
static device_t devices[64];

static char text[65536];

/* Read again only when the file was replaced, so that a benchmark measures the agent and not this library. */
static const char *state(void) {
    static ino_t inode;
    static struct timespec written;
    struct stat found;
    const char *path = getenv("TRAINCTL_FAKE_NVML");
    FILE *file;
    if (!path || stat(path, &found)) return "";
    if (found.st_ino == inode && !memcmp(&found.st_mtim, &written, sizeof written)) return text;
    inode = found.st_ino;
    written = found.st_mtim;
    file = fopen(path, "r");
    if (!file) return "";
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    return text;
}

static uint64_t number(const char *key, uint64_t otherwise) {
    size_t length = strlen(key);
    const char *line = state();
    while (line && *line) {
        if (!strncmp(line, key, length) && line[length] == ' ') return strtoull(line + length + 1, NULL, 10);
        line = strchr(line, '\n');
        if (line) line++;
    }
    return otherwise;
}

static uint64_t of_device(const device_t *device, const char *name, uint64_t otherwise) {
    char key[128];
    snprintf(key, sizeof key, "%ld.%s", device->index, name);
    return number(key, otherwise);
}

/* Every call passes here: the driver may hang, crash, or have lost this GPU; or this one call fails with a code. */
static int trouble(const device_t *device, const char *call) {
    char key[128];
    while (number("hang", 0)) usleep(10000);
    if (number("crash", 0)) abort();
    if (number("down", 0)) return (int)number("down", 0);
    if (!device) return 0;
    if (of_device(device, "lost", 0)) return 15;
    snprintf(key, sizeof key, "error.%s", call);
    return (int)of_device(device, key, 0);
}

#define FAIL_IF_TROUBLE(device, call) do { int code = trouble(device, call); if (code) return code; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; FAIL_IF_TROUBLE(NULL, "init"); return (int)number("init", 0); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "Unknown Error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    FAIL_IF_TROUBLE(NULL, "count");
    *count = (unsigned)number("count", 0);
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **device) {
    devices[index].index = index;
    *device = &devices[index];
    return trouble(*device, "handle");
}

int nvmlDeviceGetName(device_t *device, char *name, unsigned length) {
    FAIL_IF_TROUBLE(device, "name");
    snprintf(name, length, "Fake H%ld", 100 + device->index);
    return 0;
}

int nvmlDeviceGetUUID(device_t *device, char *uuid, unsigned length) {
    FAIL_IF_TROUBLE(device, "uuid");
    snprintf(uuid, length, "GPU-%08ld", device->index);
    return 0;
}

typedef struct { unsigned gpu, memory; } utilization_t;
int nvmlDeviceGetUtilizationRates(device_t *device, utilization_t *rates) {
    FAIL_IF_TROUBLE(device, "utilization");
    rates->gpu = (unsigned)of_device(device, "utilization", 0);
    rates->memory = 0;
    return 0;
}

typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    FAIL_IF_TROUBLE(device, "memory");
    memory->total = of_device(device, "memory_total", 0);
    memory->used = of_device(device, "memory_used", 0);
    memory->free = memory->total - memory->used;
    return 0;
}

#ifndef OLD_DRIVER
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *memory) {
    FAIL_IF_TROUBLE(device, "memory");
    if (memory->version != (sizeof(memory_v2_t) | 2u << 24)) return 25;
    memory->total = of_device(device, "memory_total", 0);
    memory->used = of_device(device, "memory_used", 0);
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return 0;
}

typedef struct { unsigned version, sensor; int temperature; } temperature_t;
int nvmlDeviceGetTemperatureV(device_t *device, temperature_t *temperature) {
    FAIL_IF_TROUBLE(device, "temperature");
    if (temperature->version != (sizeof(temperature_t) | 1u << 24)) return 25;
    temperature->temperature = (int)of_device(device, "temperature", 0);
    return 0;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t *device, unsigned long long *reasons) {
    FAIL_IF_TROUBLE(device, "throttle");
    *reasons = of_device(device, "throttle", 0);
    return 0;
}
#endif

int nvmlDeviceGetTemperature(device_t *device, unsigned sensor, unsigned *temperature) {
    (void)sensor;
    FAIL_IF_TROUBLE(device, "temperature");
    *temperature = (unsigned)of_device(device, "temperature", 0);
    return 0;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device_t *device, unsigned long long *reasons) {
    FAIL_IF_TROUBLE(device, "throttle");
    *reasons = of_device(device, "throttle", 0);
    return 0;
}

int nvmlDeviceGetPowerUsage(device_t *device, unsigned *milliwatts) {
    FAIL_IF_TROUBLE(device, "power");
    *milliwatts = (unsigned)of_device(device, "power_mw", 0);
    return 0;
}

int nvmlDeviceGetEnforcedPowerLimit(device_t *device, unsigned *milliwatts) {
    FAIL_IF_TROUBLE(device, "power_limit");
    *milliwatts = (unsigned)of_device(device, "power_limit_mw", 0);
    return 0;
}

int nvmlDeviceGetClockInfo(device_t *device, unsigned type, unsigned *megahertz) {
    (void)type;
    FAIL_IF_TROUBLE(device, "clock");
    *megahertz = (unsigned)of_device(device, "sm_clock", 0);
    return 0;
}

int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    FAIL_IF_TROUBLE(device, "mig");
    if (!of_device(device, "mig", 0)) return 3;
    *current = *pending = 1;
    return 0;
}
