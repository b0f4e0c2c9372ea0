package rig

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/hosthygiene/agent/test/pki"
)

// egress is how the API server reaches kubelets, for logs and exec, and agents, by
// pods/proxy. A node sits behind QEMU's address translation, so that its own
// address leads nowhere from here; the API server sends such connections through
// this HTTP CONNECT proxy, which knows the forwarded port. Node names, addresses
// and ports stay what they are on any cluster.
type egress struct {
	listener net.Listener
	server   *http.Server

	mu     sync.Mutex
	routes map[string]string // "10.0.2.15:10250" to "127.0.0.1:23456"
}

func startEgress(ca *pki.Authority) (*egress, error) {
	// With TLS, because the API server (1.36) crashes when it is given an
	// http URL without any.
	serving := ca.Issue("egress", pki.For("127.0.0.1"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting the proxy to the nodes: %w", err)
	}
	e := &egress{listener: l, routes: map[string]string{}}
	e.server = &http.Server{
		Handler: http.HandlerFunc(e.connect),
		// Not HTTP/2, whose connections cannot be taken over.
		TLSConfig: &tls.Config{
			Certificates: []tls.Certificate{serving.TLS()}, NextProtos: []string{"http/1.1"},
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
		},
	}
	go e.server.ServeTLS(l, "", "") // ends with the error that it was closed
	return e, nil
}

func (e *egress) route(from, to string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.routes[from] = to
}

func (e *egress) unroute(from string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.routes, from)
}

func (e *egress) close() error {
	if err := e.server.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("stopping the proxy to the nodes: %w", err)
	}
	return nil
}

func (e *egress) connect(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	to := e.routes[r.Host]
	e.mu.Unlock()
	if r.Method != http.MethodConnect || to == "" {
		http.Error(w, "no node at "+r.Host, http.StatusBadGateway)
		return
	}
	node, err := net.Dial("tcp", to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer node.Close()
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer client.Close()
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection Established\r\n\r\n"); err != nil {
		return
	}
	// Either side's end ends both; what a broken pipe was about to say
	// belongs to the two ends, which notice themselves.
	done := make(chan struct{}, 2)
	go func() { io.Copy(node, buffered); done <- struct{}{} }()
	go func() { io.Copy(client, node); done <- struct{}{} }()
	<-done
}
