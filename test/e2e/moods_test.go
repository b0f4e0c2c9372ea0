//go:build cluster

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// moody is the API server as the agent meets it: slow, turning away, failing, or
// itself. It serves with the API server's own certificate and passes the agent's
// token on, so that all that is refused for good is refused by the real one.
type moody struct {
	*front
	server http.Server

	mu    sync.Mutex
	now   mood
	asked []time.Time // since the mood began
	held  *heldWrite
}

// mood is what it does with requests.
type mood struct {
	delay time.Duration // before it passes one on
	code  int           // that it answers with instead
}

// heldWrite is a write of the Node's status that waits at the door: before it is
// passed on, or with the answer in hand.
type heldWrite struct {
	answered      bool
	arrived, goOn chan struct{}
}

func startMoody(t *testing.T, w *world) *moody {
	t.Helper()
	dir := w.ControlPlane.Dir()
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "apiserver.crt"), filepath.Join(dir, "apiserver.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	to, err := url.Parse(w.ControlPlane.Server())
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	proxy.FlushInterval = -1 // a watch's events are not gathered
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	quiet := log.New(io.Discard, "", 0) // connections that end are what it is for
	proxy.ErrorLog = quiet
	m := &moody{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.server = http.Server{Handler: m.handler(proxy), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}, ErrorLog: quiet}
	var serving sync.WaitGroup
	serving.Go(func() { m.server.ServeTLS(l, "", "") }) // ends with the error that it was closed
	t.Cleanup(func() {
		m.server.Close()
		serving.Wait()
	})
	m.front = startFront(t, l.Addr().String())
	return m
}

func (m *moody) handler(proxy http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		now := m.now
		m.asked = append(m.asked, time.Now())
		held := m.held
		write := r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/status")
		if held != nil && write {
			m.held = nil // only the next one
		}
		m.mu.Unlock()
		if now.delay > 0 {
			select {
			case <-time.After(now.delay):
			case <-r.Context().Done():
				return
			}
		}
		if now.code != 0 {
			refuse(w, now.code)
			return
		}
		if held == nil || !write {
			proxy.ServeHTTP(w, r)
			return
		}
		if !held.answered {
			close(held.arrived)
			<-held.goOn
			proxy.ServeHTTP(w, r) // in vain when the agent has ended meanwhile
			return
		}
		var kept keptAnswer
		proxy.ServeHTTP(&kept, r)
		close(held.arrived)
		<-held.goOn
		kept.copyTo(w)
	})
}

// keptAnswer is a response that is not sent yet.
type keptAnswer struct {
	header http.Header
	code   int
	body   []byte
}

func (k *keptAnswer) Header() http.Header {
	if k.header == nil {
		k.header = http.Header{}
	}
	return k.header
}
func (k *keptAnswer) WriteHeader(code int) { k.code = code }
func (k *keptAnswer) Write(p []byte) (int, error) {
	k.body = append(k.body, p...)
	return len(p), nil
}

func (k *keptAnswer) copyTo(w http.ResponseWriter) {
	for name, values := range k.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(max(k.code, http.StatusOK))
	w.Write(k.body) // the agent may be dead by now
}

// refuse answers as an API server does that has too much to do, or a broken one.
func refuse(w http.ResponseWriter, code int) {
	s := metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: int32(code),
		Reason: metav1.StatusReasonInternalError, Message: "for a test"}
	if code == http.StatusTooManyRequests {
		s.Reason = metav1.StatusReasonTooManyRequests
		w.Header().Set("Retry-After", "1")
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(s) // the agent may have gone
}

// be changes the mood and begins to count anew.
func (m *moody) be(now mood) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now, m.asked = now, nil
}

// requests are when the agent asked since the mood began.
func (m *moody) requests() []time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]time.Time(nil), m.asked...)
}

// hold keeps the next write of the Node's status at the door until it is let go.
func (m *moody) hold(answered bool) *heldWrite {
	h := &heldWrite{answered, make(chan struct{}), make(chan struct{})}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held = h
	return h
}

// wait waits until the write is there.
func (h *heldWrite) wait(t *testing.T) {
	t.Helper()
	select {
	case <-h.arrived:
	case <-time.After(patience):
		t.Fatal("no write of the Node's status came")
	}
}

func (h *heldWrite) letGo() { close(h.goOn) }

// lead sends the agent's pod, and only it, to the moody API server until the
// test ends. What is connected stays connected, so the agent is killed.
func (m *moody) lead(t *testing.T, w *world) {
	t.Helper()
	to, err := url.Parse(w.ControlPlane.Server())
	if err != nil {
		t.Fatal(err)
	}
	var port int
	if _, err := fmt.Sscan(to.Port(), &port); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// What leads nowhere is not cut, so that it comes back by itself.
		if _, err := w.TryGuest(w.CleanupContext(t), noFront+"\n"+rigtest.AgentPID+"kill -9 $pid"); err != nil {
			t.Error(err)
		}
	})
	w.Guest(t, fmt.Sprintf(toFront, port, m.port()))
	w.kill(t)
	if len(m.requests()) == 0 {
		t.Fatal("the agent went past the proxy")
	}
}
