/* The network services: UDP echo, TCP echo, and a TCP stream of numbers in either direction. */
#define _GNU_SOURCE
#include "shared.h"

#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PEERS = 64, BUFFER = 65536 };

static int listen_on(int type, uint16_t port)
{
    int fd = socket(AF_INET, type, 0), on = 1;
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) || (type == SOCK_STREAM && listen(fd, 16))) {
        say("vf: cannot listen on port %u", port);
        _exit(1);
    }
    return fd;
}

/* Each client gets a counter of its own, so that two probes do not count each other's packets. */
static uint64_t count_for(const struct sockaddr_in *peer)
{
    static struct { uint32_t address; uint16_t port; uint64_t count; } peers[PEERS];
    static unsigned used;
    unsigned i = 0;
    while (i < (used < PEERS ? used : PEERS) && (peers[i].address != peer->sin_addr.s_addr || peers[i].port != peer->sin_port))
        i++;
    if (i >= (used < PEERS ? used : PEERS)) {
        i = used++ % PEERS;
        peers[i].address = peer->sin_addr.s_addr;
        peers[i].port = peer->sin_port;
        peers[i].count = 0;
    }
    return ++peers[i].count;
}

static void note_drops(struct msghdr *message)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_RXQ_OVFL) {
            uint32_t drops;
            memcpy(&drops, CMSG_DATA(c), sizeof drops);
            shared->udp_buffer_drops = drops;
        }
}

/* The reply is the request and, behind it, how many requests came from this client (8 bytes, big endian). */
void run_udp_echo(void)
{
    int fd = listen_on(SOCK_DGRAM, options.udp_port), room = 8 << 20, on = 1;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    setsockopt(fd, SOL_SOCKET, SO_RXQ_OVFL, &on, sizeof on);
    static char data[BUFFER];
    for (;;) {
        char control[64];
        struct sockaddr_in peer;
        struct iovec part = {.iov_base = data, .iov_len = sizeof data - 8};
        struct msghdr message = {.msg_name = &peer, .msg_namelen = sizeof peer, .msg_iov = &part, .msg_iovlen = 1,
                                 .msg_control = control, .msg_controllen = sizeof control};
        ssize_t n = recvmsg(fd, &message, 0);
        if (n < 0)
            continue;
        shared->udp_received++;
        note_drops(&message);
        uint64_t count = htobe64(count_for(&peer));
        memcpy(data + n, &count, 8);
        sendto(fd, data, n + 8, 0, (struct sockaddr *)&peer, sizeof peer);
    }
}

static int send_all(int fd, const char *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = send(fd, data + done, size - done, MSG_NOSIGNAL);
        if (n <= 0)
            return 0;
        done += n;
    }
    return 1;
}

static void serve(uint16_t port, void (*talk)(int))
{
    int server = listen_on(SOCK_STREAM, port);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept(server, NULL, NULL), on = 1;
        if (fd < 0)
            continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        shared->tcp_connections++;
        if (fork() == 0) {
            close(server);
            talk(fd);
            _exit(0);
        }
        close(fd);
    }
}

static void talk_echo(int fd)
{
    static char data[BUFFER];
    for (ssize_t n; (n = recv(fd, data, sizeof data, 0)) > 0;) {
        __sync_fetch_and_add(&shared->tcp_echo_bytes, n);
        if (!send_all(fd, data, n))
            return;
    }
}

void run_tcp_echo(void)
{
    serve(options.tcp_port, talk_echo);
}

static void send_numbers(int fd, uint64_t rate_bytes)
{
    static uint64_t block[1024]; /* 8 KiB at a time */
    uint64_t number = 0, next = now_us();
    for (;;) {
        for (unsigned i = 0; i < 1024; i++)
            block[i] = htobe64(number++);
        if (!send_all(fd, (char *)block, sizeof block))
            return;
        __sync_fetch_and_add(&shared->stream_sent_bytes, sizeof block);
        if (!rate_bytes)
            continue;
        next += sizeof block * 1000000 / rate_bytes;
        if (now_us() > next + 500000)
            next = now_us();
        sleep_until_us(next);
    }
}

static void take_numbers(int fd)
{
    static unsigned char data[BUFFER];
    uint64_t place = 0, errors = 0;
    char answer[80];
    for (ssize_t n; (n = recv(fd, data, sizeof data, 0)) > 0;) {
        uint64_t wrong = 0;
        for (ssize_t i = 0; i < n; i++, place++)
            wrong += data[i] != (unsigned char)(place / 8 >> 8 * (7 - place % 8));
        errors += wrong;
        __sync_fetch_and_add(&shared->stream_errors, wrong);
        __sync_fetch_and_add(&shared->stream_received_bytes, n);
    }
    int length = snprintf(answer, sizeof answer, "bytes=%llu errors=%llu\n", (unsigned long long)place, (unsigned long long)errors);
    send_all(fd, answer, length);
}

/* First line from the client: "SEND <bytes per second, 0 = as fast as possible>" or "SINK". The numbers are 8 bytes
 * each, big endian, from 0. SINK checks them, and answers with the sums when the client half-closes. */
static void talk_stream(int fd)
{
    char line[64];
    size_t length = 0;
    while (length < sizeof line - 1 && recv(fd, line + length, 1, 0) == 1 && line[length] != '\n')
        length++;
    line[length] = 0;
    if (!strncmp(line, "SEND", 4))
        send_numbers(fd, strtoull(line + 4, NULL, 10));
    else if (!strcmp(line, "SINK"))
        take_numbers(fd);
}

void run_stream(void)
{
    serve(options.stream_port, talk_stream);
}
