/* PID 1 of the lab guest, started by init once modules and addresses are there: reads the options from the kernel
 * command line, starts one process per service, beats on the console, and powers off on the ACPI button. */
#define _GNU_SOURCE
#include "shared.h"

#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct shared *shared;
struct options options = {.disk_rate = 50, .disk_area_mib = 16, .check_mb = 4, .beat_ms = 1000, .status_port = 8};

uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

void sleep_until_us(uint64_t when_us)
{
    struct timespec t = {.tv_sec = when_us / 1000000, .tv_nsec = when_us % 1000000 * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

void say(const char *format, ...)
{
    char line[320];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length] = '\n';
    if (write(1, line, length + 1) < 0) {
        /* The console may be gone; the status service tells the same. */
    }
}

void page_write(uint64_t *page, uint64_t magic, uint64_t index, uint64_t generation)
{
    uint64_t step = mix(index, generation) | 1, value = mix(generation, index), sum = 0;
    page[0] = magic;
    page[1] = index;
    page[2] = generation;
    for (int i = 3; i < WORDS - 1; i++) {
        value += step;
        page[i] = value;
        sum ^= value + i;
    }
    page[WORDS - 1] = sum ^ mix(index, magic);
}

int page_sound(const uint64_t *page, uint64_t magic, uint64_t index, uint64_t generation)
{
    uint64_t step = mix(index, generation) | 1, value = mix(generation, index), sum = 0, wrong = 0;
    for (int i = 3; i < WORDS - 1; i++) {
        value += step;
        wrong |= page[i] ^ value;
        sum ^= value + i;
    }
    return !wrong && page[0] == magic && page[1] == index && page[2] == generation &&
           page[WORDS - 1] == (sum ^ mix(index, magic));
}

static void read_option(char *word)
{
    char *value = strchr(word, '=');
    if (strncmp(word, "vf.", 3) || !value)
        return;
    *value++ = 0;
    const char *name = word + 3;
    uint64_t number = strtoull(value, NULL, 10);
    struct { const char *name; uint64_t *place; } numbers[] = {
        {"dirty", &options.dirty_mb},     {"wss", &options.wss_mib},           {"check", &options.check_mb},
        {"diskrate", &options.disk_rate}, {"diskarea", &options.disk_area_mib}, {"fill", &options.fill_mib},
        {"beat", &options.beat_ms},
    };
    struct { const char *name; uint16_t *place; } ports[] = {
        {"udp", &options.udp_port}, {"tcp", &options.tcp_port}, {"stream", &options.stream_port}, {"status", &options.status_port},
    };
    for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(name, numbers[i].name))
            *numbers[i].place = number;
    for (unsigned i = 0; i < sizeof ports / sizeof *ports; i++)
        if (!strcmp(name, ports[i].name))
            *ports[i].place = number;
    if (!strcmp(name, "disk")) {
        options.verify_only = !strcmp(value, "verify");
        options.disk = number || options.verify_only;
    }
    if (!strcmp(name, "shell"))
        options.shell = number;
    if (!strcmp(name, "diskdev"))
        snprintf(options.disk_device, sizeof options.disk_device, "%s", value);
}

static void read_text(const char *path, char *buffer, size_t size)
{
    int fd = open(path, O_RDONLY);
    ssize_t length = fd < 0 ? 0 : read(fd, buffer, size - 1);
    buffer[length < 0 ? 0 : length] = 0;
    buffer[strcspn(buffer, "\n")] = 0;
    if (fd >= 0)
        close(fd);
}

static void read_options(void)
{
    char line[4096];
    snprintf(options.disk_device, sizeof options.disk_device, "/dev/vda");
    read_text("/proc/cmdline", line, sizeof line);
    for (char *word = strtok(line, " "); word; word = strtok(NULL, " "))
        read_option(word);
    if (options.dirty_mb && !options.wss_mib)
        options.wss_mib = 64;
    if (options.fill_mib)
        options.disk = 1;
}

/* Services answer before workloads get the CPU: a probe is to see the host's pauses, not the guest's own queue. */
enum { SERVICE = -15, WORKLOAD = 5 };

static void start(const char *name, void (*run)(void), int niceness)
{
    pid_t pid = fork();
    if (pid == 0) {
        setpriority(PRIO_PROCESS, 0, niceness);
        run();
        say("vf: %s ended", name);
        _exit(1);
    }
    if (pid < 0)
        say("vf: cannot start %s", name);
}

static void run_shell(void)
{
    setsid();
    ioctl(0, TIOCSCTTY, 1);
    setenv("PATH", "/bin", 1);
    setenv("PS1", "guest# ", 1);
    execl("/bin/busybox", "sh", (char *)NULL);
}

void power_off(void)
{
    kill(-1, SIGKILL); /* everybody but PID 1 and the caller: no write may be under way */
    usleep(50000);
    sync();
    reboot(RB_POWER_OFF);
}

static int open_buttons(struct pollfd *buttons, int most)
{
    int count = 0;
    for (int i = 0; i < most; i++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        int fd = open(path, O_RDONLY | O_NONBLOCK);
        if (fd >= 0)
            buttons[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    return count;
}

static void read_buttons(struct pollfd *buttons, int count)
{
    struct input_event event;
    for (int i = 0; i < count; i++)
        while (read(buttons[i].fd, &event, sizeof event) == sizeof event)
            if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
                say("vf: power button");
                power_off();
            }
}

static void supervise(void)
{
    struct pollfd buttons[8];
    int count = open_buttons(buttons, 8);
    uint64_t period_us = (options.beat_ms ? options.beat_ms : 1000) * 1000, next = now_us() + period_us;
    for (;;) {
        uint64_t now = now_us();
        poll(buttons, count, now < next ? (int)((next - now + 999) / 1000) : 0);
        read_buttons(buttons, count);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            shared->children_dead++;
        if (now_us() < next)
            continue;
        next = now_us() + period_us;
        shared->beats++;
        if (options.beat_ms && !options.shell)
            say("vf: beat %llu memory %llu/%llu disk %llu/%llu", (unsigned long long)shared->beats,
                (unsigned long long)shared->memory_pages_written, (unsigned long long)shared->memory_errors,
                (unsigned long long)shared->disk_written, (unsigned long long)shared->disk_errors);
    }
}

int main(void)
{
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->started_ms = now_us() / 1000;
    shared->disk_state = "none";
    read_text("/proc/sys/kernel/random/boot_id", shared->boot_id, sizeof shared->boot_id);
    read_options();
    shared->memory_rate_bytes = options.dirty_mb * 1000000;
    shared->memory_check_bytes = options.check_mb * 1000000;
    shared->disk_rate = options.disk_rate;
    if (options.udp_port)
        start("udp echo", run_udp_echo, SERVICE);
    if (options.tcp_port)
        start("tcp echo", run_tcp_echo, SERVICE);
    if (options.stream_port)
        start("stream", run_stream, SERVICE);
    start("status", run_status, SERVICE);
    if (options.wss_mib)
        start("memory", run_memory, WORKLOAD);
    if (options.disk)
        start("disk", run_disk, WORKLOAD);
    say("vf: ready %s", shared->boot_id);
    if (options.shell)
        start("shell", run_shell, 0);
    supervise();
}
