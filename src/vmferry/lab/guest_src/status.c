/* The status service: one UDP request, one JSON answer.
 *
 *   status                      all counters
 *   verify TOKEN, check TOKEN   asks for a check of all disk records, of all memory pages; ask again with the same
 *                               token until "state" is "done"
 *   set dirty=N | diskrate=N    changes the load (MB/s, records/s)
 *   poweroff                    powers the guest off */
#define _GNU_SOURCE
#include "shared.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef unsigned long long ull;

static char answer[2048];
static size_t used;

static void put(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(answer + used, sizeof answer - used, format, args);
    va_end(args);
    if (n > 0 && used + n < sizeof answer)
        used += n;
}

static void answer_status(void)
{
    put("{\"boot_id\":\"%s\",\"uptime_ms\":%llu,\"beats\":%llu,\"dead\":%llu,", shared->boot_id,
        (ull)(now_us() / 1000 - shared->started_ms), (ull)shared->beats, (ull)shared->children_dead);
    put("\"memory\":{\"wss_bytes\":%llu,\"rate_bytes\":%llu,\"pages_written\":%llu,\"pages_checked\":%llu,"
        "\"errors\":%llu,\"first_error\":\"%s\"},",
        (ull)shared->memory_wss_bytes, (ull)shared->memory_rate_bytes, (ull)shared->memory_pages_written,
        (ull)shared->memory_pages_checked, (ull)shared->memory_errors, shared->memory_first_error);
    put("\"disk\":{\"state\":\"%s\",\"size_bytes\":%llu,\"rate\":%llu,\"found\":%llu,\"written\":%llu,\"errors\":%llu,"
        "\"io_errors\":%llu,\"max_write_us\":%llu,\"fill_bytes\":%llu,\"fill_done\":%s,\"first_error\":\"%s\"},",
        shared->disk_state, (ull)shared->disk_bytes, (ull)shared->disk_rate, (ull)shared->disk_found,
        (ull)shared->disk_written, (ull)shared->disk_errors, (ull)shared->disk_io_errors, (ull)shared->disk_max_write_us,
        (ull)shared->fill_bytes, shared->fill_done ? "true" : "false", shared->disk_first_error);
    put("\"udp\":{\"received\":%llu,\"buffer_drops\":%llu},\"tcp\":{\"connections\":%llu,\"echo_bytes\":%llu,"
        "\"stream_sent_bytes\":%llu,\"stream_received_bytes\":%llu,\"stream_errors\":%llu}}",
        (ull)shared->udp_received, (ull)shared->udp_buffer_drops, (ull)shared->tcp_connections,
        (ull)shared->tcp_echo_bytes, (ull)shared->stream_sent_bytes, (ull)shared->stream_received_bytes,
        (ull)shared->stream_errors);
}

static void answer_job(struct job *job, const char *token, int possible)
{
    if (!possible) {
        put("{\"state\":\"impossible\",\"reason\":\"this workload is not running\"}");
        return;
    }
    int idle = job->asked == job->finished;
    int same = !strncmp(job->token, token, TOKEN - 1);
    if (idle && !same) {
        snprintf(job->token, TOKEN, "%.*s", TOKEN - 1, token);
        job->checked = job->errors = 0;
        __sync_synchronize();
        job->asked++;
    } else if (idle) {
        put("{\"state\":\"done\",\"checked\":%llu,\"errors\":%llu,\"first_error\":\"%s\"}", (ull)job->checked,
            (ull)job->errors, job->first_error);
        return;
    }
    put("{\"state\":\"%s\",\"checked\":%llu}", same || idle ? "running" : "busy", (ull)job->checked);
}

static void answer_set(const char *what)
{
    if (!strncmp(what, "dirty=", 6))
        shared->memory_rate_bytes = strtoull(what + 6, NULL, 10) * 1000000;
    else if (!strncmp(what, "diskrate=", 9))
        shared->disk_rate = strtoull(what + 9, NULL, 10);
    answer_status();
}

static void answer_to(const char *request)
{
    used = 0;
    if (!strncmp(request, "verify ", 7))
        answer_job(&shared->disk_job, request + 7, !strcmp(shared->disk_state, "writing") || !strcmp(shared->disk_state, "verifying"));
    else if (!strncmp(request, "check ", 6))
        answer_job(&shared->memory_job, request + 6, shared->memory_wss_bytes != 0);
    else if (!strncmp(request, "set ", 4))
        answer_set(request + 4);
    else
        answer_status();
}

void run_status(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(options.status_port)}, peer;
    if (bind(fd, (struct sockaddr *)&any, sizeof any))
        return;
    for (;;) {
        char request[128];
        socklen_t size = sizeof peer;
        ssize_t n = recvfrom(fd, request, sizeof request - 1, 0, (struct sockaddr *)&peer, &size);
        if (n < 0)
            continue;
        request[n] = 0;
        request[strcspn(request, "\r\n")] = 0;
        answer_to(request);
        sendto(fd, answer, used, 0, (struct sockaddr *)&peer, size);
        if (!strcmp(request, "poweroff"))
            power_off();
    }
}
