//go:build cluster

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/test/pki"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// metricsForCertificates installs the overlay metrics-tls with the web config of
// the examples and real Secrets: nothing is served before they are there, then
// only to who shows a certificate, and a renewed one is served without a restart.
func (w *world) metricsForCertificates(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	t.Cleanup(func() { w.remove(t) })
	w.Kubectl(t, "apply", "-f", manifests+"kustomize/base/namespace.yaml")
	w.Kubectl(t, "apply", "-k", manifests+"kustomize/overlays/metrics-tls")
	w.PodReady(t, 0)
	pod, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	ca, stranger := pki.NewAuthority("e2e"), pki.NewAuthority("another")
	get := func(scheme string, by *pki.Authority) (status int, body string, served *x509.Certificate, err error) {
		config := &tls.Config{RootCAs: ca.Pool(), ServerName: "agent.e2e"}
		if by != nil {
			config.Certificates = []tls.Certificate{by.Issue("prometheus").TLS()}
		}
		client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
		answer, err := client.Get(fmt.Sprintf("%s://127.0.0.1:%d/metrics", scheme, w.Node.MetricsPort()))
		if err != nil {
			return 0, "", nil, err
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(answer.Body)
		if answer.TLS != nil {
			served = answer.TLS.PeerCertificates[0]
		}
		return answer.StatusCode, string(data), served, err
	}
	if status, _, _, err := get("https", ca); err == nil {
		t.Errorf("without the Secrets metrics are served: %d", status)
	}

	dir := t.TempDir()
	var keys []string
	secret := func(name string, files map[string][]byte) {
		t.Helper()
		args := []string{"create", "secret", "generic", name, "-n", rigtest.Namespace, "--dry-run=client", "-o", "yaml"}
		for file, data := range files {
			if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, "--from-file="+filepath.Join(dir, file))
		}
		manifest := filepath.Join(dir, name+".yaml")
		if err := os.WriteFile(manifest, []byte(w.Kubectl(t, args...)), 0o600); err != nil {
			t.Fatal(err)
		}
		w.Kubectl(t, "apply", "-f", manifest)
	}
	issue := func() (serial *big.Int) {
		t.Helper()
		p := ca.Issue("agent.e2e", pki.For("agent.e2e"))
		keys = append(keys, strings.Split(string(p.KeyPEM()), "\n")[1])
		secret("host-hygiene-metrics-tls", map[string][]byte{"tls.crt": p.CertPEM(), "tls.key": p.KeyPEM(), "ca.crt": ca.CertPEM()})
		return p.Cert.SerialNumber
	}
	served := func(serial *big.Int) func() error {
		return func() error {
			status, body, cert, err := get("https", ca)
			switch {
			case err != nil:
				return err
			case status != http.StatusOK || !strings.Contains(body, "hosthygiene_"):
				return fmt.Errorf("answered %d: %.200s", status, body)
			case cert.SerialNumber.Cmp(serial) != 0:
				return fmt.Errorf("served with the certificate %v, want %v", cert.SerialNumber, serial)
			}
			return nil
		}
	}
	web, err := os.ReadFile("../../examples/web.yml")
	if err != nil {
		t.Fatal(err)
	}
	serial := issue()
	secret("host-hygiene-metrics-web", map[string][]byte{"web.yml": web})
	// The kubelet brings a Secret to a pod within a minute or two.
	w.Await(t, "metrics over TLS", served(serial))
	if _, _, _, err := get("https", nil); err == nil {
		t.Error("metrics are served without a certificate")
	}
	if _, _, _, err := get("https", stranger); err == nil {
		t.Error("metrics are served for a certificate of another authority")
	}
	if status, body, _, err := get("http", nil); err == nil && (status == http.StatusOK || strings.Contains(body, "hosthygiene_")) {
		t.Errorf("metrics are served without TLS: %d %.100s", status, body)
	}
	w.Await(t, "a renewed certificate", served(issue()))

	now, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if now.UID != pod.UID || now.Status.ContainerStatuses[0].RestartCount != pod.Status.ContainerStatuses[0].RestartCount {
		t.Error("the agent was restarted meanwhile")
	}
	log := w.Kubectl(t, "logs", "-n", rigtest.Namespace, now.Name)
	for _, key := range keys {
		if strings.Contains(log, key) {
			t.Error("a private key stands in the log")
		}
	}
}
