// cc examples/subscriber.c -lzmq -o subscriber && ./subscriber tcp://127.0.0.1:5599
#include <stdio.h>
#include <zmq.h>

int main(int argc, char **argv) {
    void *socket = zmq_socket(zmq_ctx_new(), ZMQ_SUB);
    zmq_connect(socket, argc > 1 ? argv[1] : "tcp://127.0.0.1:5599");
    zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "prediction", 10);
    static char topic[16], json[1 << 20];  // every message has these two parts
    while (zmq_recv(socket, topic, sizeof topic, 0) >= 0) {
        int length = zmq_recv(socket, json, sizeof json, 0);
        printf("%.*s\n", length, json);
        fflush(stdout);
    }
}
