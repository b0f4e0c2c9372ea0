package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/test/pki"
)

// Of the passwords "right" and "other", at bcrypt's least cost.
const (
	hashOfRight = "$2a$04$jPtiUbSWSmYQ8fCYycBQMOpnc6YgQfb38nIXGCGj.c5ZQNwxvxa16"
	hashOfOther = "$2a$04$EcZ.16o0fN6kL/d6U2XlhOs/5ZYfTUgf2aOgl/8nQKau52hyHHaom"
)

// protectedServer is protectedMetrics at work, with what it said.
type protectedServer struct {
	t    *testing.T
	dir  string
	tell chan string
	at   chan string

	mu      sync.Mutex
	log     bytes.Buffer
	secrets []string
}

func (s *protectedServer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(b)
}

// write puts a file into the config's folder as the kubelet does: whole. What of
// it is a secret must not be seen in the log or an Event.
func (s *protectedServer) write(name string, data []byte) {
	s.t.Helper()
	for line := range strings.Lines(string(data)) {
		if strings.Contains(name, "key") && !strings.HasPrefix(line, "-----") {
			s.secrets = append(s.secrets, strings.TrimSpace(line))
		}
	}
	tmp := filepath.Join(s.dir, ".tmp")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(s.dir, name)); err != nil {
		s.t.Fatal(err)
	}
}

func startProtected(t *testing.T, files map[string]string) *protectedServer {
	t.Helper()
	s := &protectedServer{t: t, dir: t.TempDir(), tell: make(chan string, 100), at: make(chan string, 100), secrets: []string{hashOfRight[8:], hashOfOther[8:]}}
	for name, data := range files {
		s.write(name, []byte(data))
	}
	var events []string
	p := protectedMetrics{
		address: "127.0.0.1:0", config: filepath.Join(s.dir, "web.yml"), every: 20 * time.Millisecond, retry: 10 * time.Millisecond,
		handler: metricsHandler(report.NewMetrics("v1", nil)), log: slog.New(slog.NewTextHandler(s, &slog.HandlerOptions{Level: slog.LevelDebug})),
		tell: func(kind, reason, subject, message string) {
			events = append(events, message)
			s.tell <- kind + " " + reason + " " + subject + ": " + message
		},
		listening: func(a net.Addr) { s.at <- a.String() },
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.mu.Lock() // a connection that was cut may still say so
		defer s.mu.Unlock()
		said := s.log.String() + strings.Join(events, "\n")
		for _, secret := range s.secrets {
			if strings.Contains(said, secret) {
				t.Errorf("%q is in the log or an Event:\n%s", secret, said)
			}
		}
	})
	return s
}

// next waits for what is due.
func next(t *testing.T, from chan string) string {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(30 * time.Second):
		t.Fatal("it did not come")
		return ""
	}
}

// get returns the status and body, or the error as the body.
func get(t *testing.T, url string, config *tls.Config, user, password string) (int, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true, ForceAttemptHTTP2: true}, Timeout: 30 * time.Second}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

const served = "hosthygiene_build_info"

func trusting(a *pki.Authority, certs ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: a.Pool(), Certificates: certs}
}

// issued returns a new certificate of a server here and its key, as PEM.
func issued(a *pki.Authority) (cert, key []byte) {
	p := a.Issue("server", pki.For("127.0.0.1"))
	return p.CertPEM(), p.KeyPEM()
}

const tlsOnly = "tls_server_config: {cert_file: tls.crt, key_file: tls.key}\n"

func TestMetricsOverTLS(t *testing.T) {
	ca := pki.NewAuthority("a test's")
	cert, key := issued(ca)
	s := startProtected(t, map[string]string{"web.yml": tlsOnly, "tls.crt": string(cert), "tls.key": string(key)})
	at := next(t, s.at)

	if code, body := get(t, "https://"+at+"/metrics", trusting(ca), "", ""); code != http.StatusOK || !strings.Contains(body, served) {
		t.Errorf("over TLS: %d %s", code, body)
	}
	if code, body := get(t, "http://"+at+"/metrics", nil, "", ""); code == http.StatusOK || strings.Contains(body, served) {
		t.Errorf("in plain text: %d %s", code, body)
	}
	for _, page := range []string{"/debug/pprof/", "/debug/requests", "/debug/vars", "/"} {
		if code, _ := get(t, "https://"+at+page, trusting(ca), "", ""); code != http.StatusNotFound {
			t.Errorf("%s: %d", page, code)
		}
	}
	old := trusting(ca)
	old.MaxVersion = tls.VersionTLS11
	if code, body := get(t, "https://"+at+"/metrics", old, "", ""); code != 0 {
		t.Errorf("with TLS 1.1: %d %s", code, body)
	}

	// A certificate that is renewed.
	shown := func() (cert []byte, err error) {
		conn, err := tls.Dial("tcp", at, trusting(ca))
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: conn.ConnectionState().PeerCertificates[0].Raw}), nil
	}
	if before, err := shown(); err != nil || !bytes.Equal(before, cert) {
		t.Errorf("another certificate is shown (%v)", err)
	}
	// For a moment the two do not belong together, which may be told.
	cert, key = issued(ca)
	s.write("tls.crt", cert)
	s.write("tls.key", key)
	if after, err := shown(); err != nil || !bytes.Equal(after, cert) {
		t.Errorf("the old certificate is shown (%v)", err)
	}

	// One that is not there closes the door and is told, and so is its end.
	if err := os.Remove(filepath.Join(s.dir, "tls.crt")); err != nil {
		t.Fatal(err)
	}
	for !strings.HasPrefix(next(t, s.tell), "Warning MetricsNotServed metrics: web config "+s.dir+"/web.yml: failed to read cert_file") {
	}
	if _, err := shown(); err == nil {
		t.Error("a connection was made without a certificate")
	}
	s.write("tls.crt", cert)
	if got := next(t, s.tell); got != "Normal MetricsServed metrics: the web config is right, metrics are served" {
		t.Error(got)
	}
	if after, err := shown(); err != nil || !bytes.Equal(after, cert) {
		t.Errorf("another certificate is shown (%v)", err)
	}
}

// The example is for client certificates.
func TestMetricsForClientCertificates(t *testing.T) {
	ca, other := pki.NewAuthority("a test's"), pki.NewAuthority("a test's")
	cert, key := issued(ca)
	example, err := os.ReadFile("../../examples/web.yml")
	if err != nil {
		t.Fatal(err)
	}
	s := startProtected(t, map[string]string{"web.yml": string(example), "tls.crt": string(cert), "tls.key": string(key), "ca.crt": string(ca.CertPEM())})
	at := next(t, s.at)
	pair := func(a *pki.Authority) tls.Certificate { return a.Issue("prometheus").TLS() }
	for _, c := range []struct {
		who    string
		config *tls.Config
		ok     bool
	}{
		{"nobody", trusting(ca), false},
		{"who has a certificate of another authority", trusting(ca, pair(other)), false},
		{"who has one of ours", trusting(ca, pair(ca)), true},
	} {
		code, body := get(t, "https://"+at+"/metrics", c.config, "", "")
		if ok := code == http.StatusOK && strings.Contains(body, served); ok != c.ok || (!ok && code != 0) {
			t.Errorf("%s: %d %s", c.who, code, body)
		}
	}
}

func TestMetricsForAPassword(t *testing.T) {
	users := func(hash string) []byte { return fmt.Appendf(nil, "basic_auth_users: {prometheus: %s}\n", hash) }
	s := startProtected(t, map[string]string{"web.yml": string(users(hashOfRight))})
	at := next(t, s.at)
	try := func(user, password string, want int) {
		t.Helper()
		code, body := get(t, "http://"+at+"/metrics", nil, user, password)
		if code != want || strings.Contains(body, served) != (want == http.StatusOK) {
			t.Errorf("%s %s: %d %s, want %d", user, password, code, body, want)
		}
	}
	try("", "", http.StatusUnauthorized)
	try("prometheus", "wrong", http.StatusUnauthorized)
	try("nobody", "right", http.StatusUnauthorized)
	try("prometheus", "right", http.StatusOK)
	s.write("web.yml", users(hashOfOther))
	try("prometheus", "right", http.StatusUnauthorized)
	try("prometheus", "other", http.StatusOK)

	// The last user gone does not open the door to everybody.
	s.write("web.yml", []byte("basic_auth_users: {}\n"))
	try("prometheus", "other", http.StatusInternalServerError)
	try("", "", http.StatusInternalServerError)
	if got := next(t, s.tell); !strings.Contains(got, "neither tls_server_config nor basic_auth_users") {
		t.Error(got)
	}

	// TLS switched on needs a new listener, and gets one.
	ca := pki.NewAuthority("a test's")
	cert, key := issued(ca)
	s.write("tls.crt", cert)
	s.write("tls.key", key)
	s.write("web.yml", append(users(hashOfRight), tlsOnly...))
	at = next(t, s.at)
	try("prometheus", "right", http.StatusBadRequest) // "Client sent an HTTP request to an HTTPS server."
	if code, _ := get(t, "https://"+at+"/metrics", trusting(ca), "prometheus", "wrong"); code != http.StatusUnauthorized {
		t.Errorf("a wrong password over TLS: %d", code)
	}
	if code, body := get(t, "https://"+at+"/metrics", trusting(ca), "prometheus", "right"); code != http.StatusOK || !strings.Contains(body, served) {
		t.Errorf("over TLS: %d %s", code, body)
	}
}

// With no web config, or a wrong one, the port stays closed until there is a right one.
func TestMetricsWaitForARightWebConfig(t *testing.T) {
	s := startProtected(t, nil)
	if got := next(t, s.tell); !strings.HasPrefix(got, "Warning MetricsNotServed metrics: web config ") || !strings.Contains(got, "no such file or directory") {
		t.Error(got)
	}
	s.write("web.yml", []byte("tls_server_confg: {}\n"))
	if got := next(t, s.tell); !strings.Contains(got, "line 1: field tls_server_confg not found") {
		t.Error(got)
	}
	if len(s.at) > 0 {
		t.Error("it listens")
	}
	s.write("web.yml", []byte("basic_auth_users: {prometheus: "+hashOfRight+"}\n"))
	if got := next(t, s.tell); !strings.HasPrefix(got, "Normal MetricsServed") {
		t.Error(got)
	}
	if code, _ := get(t, "http://"+next(t, s.at)+"/metrics", nil, "prometheus", "right"); code != http.StatusOK {
		t.Errorf("%d", code)
	}
}

// What is told of a wrong file helps, and tells nobody its secrets.
func TestWrongWebConfigs(t *testing.T) {
	_, key := issued(pki.NewAuthority("a test's"))
	secret := string(bytes.Split(key, []byte("\n"))[1])
	for _, c := range []struct{ text, want string }{
		{"", "neither tls_server_config nor basic_auth_users: leave out --web.config.file to serve metrics to everybody"},
		{"http_server_config: {http2: false}\n", "neither tls_server_config nor basic_auth_users: leave out --web.config.file to serve metrics to everybody"},
		{"tls_server_config: {cert_file: tls.crt}\n", "missing one of key or key_file"},
		{"tls_server_config: {cert_file: no.crt, key_file: no.key}\n", "failed to read cert_file (DIR/no.crt): open DIR/no.crt: no such file or directory"},
		{"tls_server_config: {cert: x, key: " + secret + "}\n", "failed to load X509KeyPair: tls: failed to find any PEM data in certificate input"},
		{"basic_auth_users: {prometheus: supersecret}\n", "basic_auth_users: a password is no bcrypt hash, such as htpasswd -nB NAME prints"},
		{"basic_auth_users: " + hashOfRight + "\n", "yaml: unmarshal errors: line 1: cannot unmarshal !!str … into map[string]config.Secret"},
		{"basic_auth_users: {" + hashOfRight + ": {x: 1}}\n", "yaml: unmarshal errors: line 1: cannot unmarshal !!map into config.plain"},
		{hashOfRight + ": x\n", "yaml: unmarshal errors: line 1: field … not found in type web.Config"},
		{"http_server_config: {http2: " + secret + "}\n", "yaml: unmarshal errors: line 1: cannot unmarshal !!str … into bool"},
		{"http_server_config: {http2: hunter2}\n", "yaml: unmarshal errors: line 1: cannot unmarshal !!str … into bool"},
		{"tls_server_config: [\n", "yaml: line 1: did not find expected node content"},
	} {
		file := filepath.Join(t.TempDir(), "web.yml")
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := readWebConfig(file)
		if err == nil {
			t.Errorf("%q is taken", c.text)
			continue
		}
		want := "web config " + file + ": " + strings.ReplaceAll(c.want, "DIR", filepath.Dir(file))
		if err.Error() != want {
			t.Errorf("%q:\n got %s\nwant %s", c.text, err, want)
		}
	}
}
