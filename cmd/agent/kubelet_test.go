package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/test/pki"
)

const kubeletToken = "a-token-that-nobody-else-sees"

// servedKubelet plays the kubelet of a tree's host.
type servedKubelet struct {
	*kubelet
	dir string
	// tokens counts the requests that came with the token.
	tokens atomic.Int32
	conns  sync.WaitGroup

	listener  net.Listener
	accepting sync.WaitGroup
}

// serveKubelet speaks TLS with a certificate and leaves the rest to serve, which
// is given each connection once a request was read from it.
func serveKubelet(t *testing.T, a *pki.Authority, cert tls.Certificate, serve func(c net.Conn)) *servedKubelet {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s := newServedKubelet(t, a, l.Addr().String())
	s.accept(l, func(raw net.Conn) {
		c := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}})
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		if req.Header.Get("Authorization") == "Bearer "+kubeletToken {
			s.tokens.Add(1)
		}
		serve(c)
	})
	return s
}

func (s *servedKubelet) accept(l net.Listener, serve func(net.Conn)) {
	s.listener = l
	s.accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
}

func newServedKubelet(t *testing.T, a *pki.Authority, address string) *servedKubelet {
	t.Helper()
	s := &servedKubelet{dir: t.TempDir()}
	tree, err := host.OpenTree(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	token, ca := filepath.Join(t.TempDir(), "token"), filepath.Join(t.TempDir(), "ca.crt")
	for name, data := range map[string][]byte{token: []byte(kubeletToken + "\n"), ca: a.CertPEM()} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.kubelet = &kubelet{address: address, tokenFile: token, caFile: ca, names: []string{"n1", "192.0.2.7"},
		view: func() host.View { return tree }, limit: 1 << 20}
	// The kubelet whose flags say where its files are.
	for name, data := range map[string]string{
		"proc/1/stat":      "1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
		"proc/640/stat":    "640 (kubelet) S 1 640 640 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 9 0 99 0 0 0\n",
		"proc/640/comm":    "kubelet\n",
		"proc/640/cmdline": "/usr/bin/kubelet\x00--config=/var/lib/kubelet/config.yaml\x00",
		"proc/640/cgroup":  "0::/system.slice/kubelet.service\n",
	} {
		s.write(t, name, []byte(data))
	}
	for _, pid := range []string{"1", "640"} {
		if err := os.MkdirAll(filepath.Join(s.dir, "proc", pid, "ns"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("mnt:[1]", filepath.Join(s.dir, "proc", pid, "ns/mnt")); err != nil {
			t.Fatal(err)
		}
	}
	s.connect()
	t.Cleanup(s.client.CloseIdleConnections)
	return s
}

// write puts a file into the host's tree.
func (s *servedKubelet) write(t *testing.T, name string, data []byte) {
	t.Helper()
	at := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// ask gets a path, and returns what was read of the answer.
func (s *servedKubelet) ask(ctx context.Context) (string, error) {
	var b strings.Builder
	err := s.get(ctx, "/configz", func(r io.Reader) error {
		_, err := io.Copy(&b, r)
		return err
	})
	return b.String(), err
}

// certificate makes one of a kubelet's server; an authority of nil has it sign
// itself.
func certificate(a *pki.Authority, changes ...func(*x509.Certificate)) tls.Certificate {
	return a.Issue("system:node:n1", append([]func(*x509.Certificate){pki.Of("system:nodes"), pki.For("n1"), func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}}, changes...)...).TLS()
}

func certPEM(c tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
}

func answerWith(text string) func(net.Conn) {
	return func(c net.Conn) {
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	}
}

// The token goes to the kubelet of this node and to nobody else that took its
// port: the certificate decides.
func TestKubeletCertificate(t *testing.T) {
	a, stranger := pki.NewAuthority("a test's"), pki.NewAuthority("a test's")
	const dir = "var/lib/kubelet/pki/"
	key := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte("not to be looked at")})
	for name, c := range map[string]struct {
		cert  tls.Certificate
		files func(cert tls.Certificate) map[string][]byte
		says  string // "" for one that is trusted
	}{
		"the cluster's, by the node's name":    {cert: certificate(a, pki.For("n1"))},
		"the cluster's, by the node's address": {cert: certificate(a, pki.For("192.0.2.7"))},
		"its own, on the host": {cert: certificate(nil), files: func(c tls.Certificate) map[string][]byte {
			return map[string][]byte{dir + "kubelet.crt": certPEM(c)}
		}},
		"its own, beside the key": {cert: certificate(nil), files: func(c tls.Certificate) map[string][]byte {
			return map[string][]byte{dir + "kubelet-server-current.pem": append(key, certPEM(c)...)}
		}},
		"the cluster's for another name, on the host": {cert: certificate(a, pki.For("elsewhere")), files: func(c tls.Certificate) map[string][]byte {
			return map[string][]byte{dir + "kubelet-server-current.pem": append(certPEM(c), key...)}
		}},
		"of the kubelet's config": {cert: certificate(stranger), files: func(c tls.Certificate) map[string][]byte {
			return map[string][]byte{"var/lib/kubelet/config.yaml": []byte("tlsCertFile: /etc/kubelet.crt\n"), "etc/kubelet.crt": certPEM(c)}
		}},

		"the cluster's, of another node": {cert: certificate(a, pki.For("n2", "192.0.2.8")), says: "for another host than n1 or 192.0.2.7"},
		"the cluster's, named in the CN": {cert: certificate(a, pki.For()), says: "for another host"},
		"the cluster's, of loopback":     {cert: certificate(a, pki.For("localhost", "127.0.0.1")), says: "for another host"},
		"the cluster's, of a client":     {cert: certificate(a, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), says: "neither signed by"},
		"the cluster's, a day after its end": {cert: certificate(a, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
		}), says: "neither signed by"},
		"another authority's, by the node's name": {cert: certificate(stranger, pki.For("n1")), says: "neither signed by"},
		"its own, on no host":                     {cert: certificate(nil), says: "neither signed by"},
		"another than on the host": {cert: certificate(nil), files: func(tls.Certificate) map[string][]byte {
			return map[string][]byte{dir + "kubelet.crt": certPEM(certificate(nil))}
		}, says: "neither signed by"},
		"what the config does not name": {cert: certificate(nil), files: func(c tls.Certificate) map[string][]byte {
			return map[string][]byte{"var/lib/kubelet/config.yaml": []byte("tlsCertFile: /etc/kubelet.crt\n"), dir + "kubelet.crt": certPEM(c)}
		}, says: "neither signed by"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveKubelet(t, a, c.cert, answerWith("well"))
			if c.files != nil {
				for file, data := range c.files(c.cert) {
					s.write(t, file, data)
				}
			}
			got, err := s.ask(t.Context())
			if c.says == "" {
				if got != "well" || err != nil || s.tokens.Load() != 1 {
					t.Errorf("%q, %v; %d requests with the token", got, err, s.tokens.Load())
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) || s.tokens.Load() != 0 {
				t.Errorf("%q, %v; want %q; the token was shown %d times", got, err, c.says, s.tokens.Load())
			}
		})
	}
}

// dribble writes a byte now and then, until the client goes.
func dribble(c net.Conn, text string) {
	for i := 0; ; i++ {
		if _, err := c.Write([]byte{text[i%len(text)]}); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func forEver(w io.Writer, text string) {
	again := []byte(strings.Repeat(text, 1+4096/len(text)))
	for {
		if _, err := w.Write(again); err != nil {
			return
		}
	}
}

// A kubelet that answers badly costs the pass its patience and a bounded amount of
// memory, is an error in words, and keeps no connection.
func TestKubeletAnswersBadly(t *testing.T) {
	a := pki.NewAuthority("a test's")
	cert := certificate(a)
	other := serveKubelet(t, a, cert, answerWith("not to be asked"))
	const ok = "HTTP/1.1 200 OK\r\n"
	late := context.DeadlineExceeded
	for name, c := range map[string]struct {
		serve func(net.Conn)
		says  string
		is    error
	}{
		"silence":              {serve: func(c net.Conn) { io.Copy(io.Discard, c) }, is: late},
		"a head, byte by byte": {serve: func(c net.Conn) { io.WriteString(c, ok); dribble(c, "X: y\r\n") }, is: late},
		"a body, byte by byte": {serve: func(c net.Conn) { io.WriteString(c, ok+"Content-Length: 100000\r\n\r\n"); dribble(c, "{") }, is: late},
		"an end that never is": {serve: func(c net.Conn) { io.WriteString(c, ok+"Content-Length: 3\r\n\r\n{}"); io.Copy(io.Discard, c) }, is: late},
		"nothing":              {serve: func(net.Conn) {}, is: io.EOF},
		"a head for ever":      {serve: func(c net.Conn) { io.WriteString(c, ok); forEver(c, "X: y\r\n") }, says: "headers exceeded 65536 bytes"},
		"one line for ever":    {serve: func(c net.Conn) { io.WriteString(c, ok+"X: "); forEver(c, "y") }, says: "headers exceeded 65536 bytes"},
		"hints for ever":       {serve: func(c net.Conn) { forEver(c, "HTTP/1.1 103 Early Hints\r\n\r\n") }, says: "headers exceeded 65536 bytes"},
		"a body for ever":      {serve: func(c net.Conn) { io.WriteString(c, ok+"\r\n"); forEver(c, "{") }, is: host.ErrTooLarge},
		"chunks for ever": {serve: func(c net.Conn) {
			io.WriteString(c, ok+"Transfer-Encoding: chunked\r\n\r\n")
			forEver(c, "3\r\n{{{\r\n")
		}, is: host.ErrTooLarge},
		"a chunk beyond number": {serve: func(c net.Conn) {
			io.WriteString(c, ok+"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n")
			forEver(c, "{")
		}, says: "chunk length too large"},
		"a chunk of 2^63": {serve: func(c net.Conn) {
			io.WriteString(c, ok+"Transfer-Encoding: chunked\r\n\r\n8000000000000000\r\n")
			forEver(c, "{")
		}, is: host.ErrTooLarge},
		"cut off": {serve: func(c net.Conn) { io.WriteString(c, ok+"Content-Length: 9223372036854775807\r\n\r\n{}") }, is: io.ErrUnexpectedEOF},
		"zeros, in gzip": {serve: func(c net.Conn) {
			io.WriteString(c, ok+"Content-Encoding: gzip\r\n\r\n")
			forEver(gzip.NewWriter(c), "\x00")
		}, is: host.ErrTooLarge},
		"garbage": {serve: func(c net.Conn) { forEver(c, "\x00\xff\x1b[2J\n") }, says: "malformed HTTP"},
		"a redirect": {serve: func(c net.Conn) {
			fmt.Fprintf(c, "HTTP/1.1 307 Temporary Redirect\r\nLocation: https://%s/configz\r\nContent-Length: 0\r\n\r\n", other.address)
		}, says: "answers 307 Temporary Redirect to /configz"},
		"a refusal":           {serve: func(c net.Conn) { io.WriteString(c, "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden") }, says: "answers 403 Forbidden to /configz: Forbidden"},
		"a refusal for ever":  {serve: func(c net.Conn) { io.WriteString(c, "HTTP/1.1 500 Oh\r\n\r\n"); forEver(c, "no") }, says: "answers 500 Oh to /configz: nono"},
		"a status beyond any": {serve: func(c net.Conn) { fmt.Fprintf(c, "HTTP/1.1 500 %s\r\n\r\n", strings.Repeat("x", 60<<10)) }, says: "answers 500 xxx"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveKubelet(t, a, cert, c.serve)
			limit := time.Minute
			if c.is == late {
				limit = 300 * time.Millisecond
			}
			s.askBadly(t, limit, c.says, c.is)
		})
	}
	if n := other.tokens.Load(); n != 0 {
		t.Errorf("it was followed elsewhere, %d times", n)
	}
}

// The same for who does not even speak TLS: it never sees the token.
func TestKubeletIsNone(t *testing.T) {
	for name, c := range map[string]struct {
		serve func(net.Conn)
		says  string
		is    error
	}{
		"silence":          {serve: func(c net.Conn) { io.Copy(io.Discard, c) }, is: context.DeadlineExceeded},
		"byte by byte":     {serve: func(c net.Conn) { dribble(c, "\x16\x03\x03\x40\x00\x02\x00\x3f\xfc") }, is: context.DeadlineExceeded},
		"garbage for ever": {serve: func(c net.Conn) { forEver(c, "\xff\x00garbage") }, says: "tls: "},
		"plain HTTP":       {serve: func(c net.Conn) { c.Read(make([]byte, 512)); answerWith("{}")(c) }, says: "HTTP response to HTTPS client"},
		"the end":          {serve: func(net.Conn) {}, says: "/configz"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			s := newServedKubelet(t, pki.NewAuthority("a test's"), l.Addr().String())
			s.accept(l, c.serve)
			limit := time.Minute
			if c.is != nil {
				limit = 300 * time.Millisecond
			}
			s.askBadly(t, limit, c.says, c.is)
		})
	}
}

// askBadly asks what does not answer well.
func (s *servedKubelet) askBadly(t *testing.T, limit time.Duration, says string, is error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got, err := s.ask(ctx)
	runtime.ReadMemStats(&after)
	if err == nil || !strings.Contains(err.Error(), says) || is != nil && !errors.Is(err, is) {
		t.Errorf("%.40q, %.300v; want %v, %q", got, err, is, says)
	}
	if err != nil && len(err.Error()) > 1000 {
		t.Errorf("an error of %d bytes", len(err.Error()))
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 32<<20 {
		t.Errorf("it took %d MiB", took>>20)
	}
	s.client.CloseIdleConnections()
	s.listener.Close()
	s.accepting.Wait()
	s.conns.Wait() // the test hangs where a connection is kept
}
