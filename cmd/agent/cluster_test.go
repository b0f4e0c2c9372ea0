package main

import (
	"crypto/x509"
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/test/pki"
)

// kubeletHost is a host whose kubelet was started with these arguments.
func kubeletHost(comm string, files map[string]string, argv ...string) string {
	tree := "-- procs --\n1 systemd ppid=0\n640 " + comm + "\n-- links --\n/proc/1/ns/mnt -> mnt:[1]\n/proc/640/ns/mnt -> mnt:[1]\n/proc/640/cwd -> /\n" +
		"-- tree/proc/640/cgroup --\n0::/system.slice/kubelet.service\n" +
		"-- treebin/proc/640/cmdline --\n" + strings.Join(argv, `\x00`) + `\x00` + "\n"
	for name, text := range files {
		tree += "-- tree" + name + " --\n" + text + "\n"
	}
	return tree
}

// TestKubeletOfEveryVendor finds what the agent needs of the kubelet where each
// vendor keeps it: by the running kubelet's flags and configuration, and by
// well-known names where those are hidden. The sources stand in docs/clusters.md.
func TestKubeletOfEveryVendor(t *testing.T) {
	certificate, der := selfSigned()
	_, another := selfSigned()
	kubeconfig := "clusters:\n- cluster:\n    server: https://api.example:6443"
	for name, test := range map[string]struct {
		comm                     string
		argv                     []string
		config, certs, kubeconfs map[string]string
	}{
		"kubeadm": {comm: "kubelet",
			argv:      []string{"/usr/bin/kubelet", "--kubeconfig=/etc/kubernetes/kubelet.conf", "--config=/var/lib/kubelet/config.yaml"},
			config:    map[string]string{"/var/lib/kubelet/config.yaml": "kind: KubeletConfiguration"},
			certs:     map[string]string{"/var/lib/kubelet/pki/kubelet.crt": certificate},
			kubeconfs: map[string]string{"/etc/kubernetes/kubelet.conf": kubeconfig}},
		"AKS without rotation of serving certificates": {comm: "kubelet",
			argv:      []string{"/usr/local/bin/kubelet", "--kubeconfig", "/var/lib/kubelet/kubeconfig", "--tls-cert-file=/etc/kubernetes/certs/kubeletserver.crt"},
			certs:     map[string]string{"/etc/kubernetes/certs/kubeletserver.crt": certificate},
			kubeconfs: map[string]string{"/var/lib/kubelet/kubeconfig": kubeconfig}},
		"GKE": {comm: "kubelet",
			argv:      []string{"/home/kubernetes/bin/kubelet", "--kubeconfig=/var/lib/kubelet/kubeconfig", "--config", "/home/kubernetes/kubelet-config.yaml", "--cert-dir=/var/lib/kubelet/pki/"},
			config:    map[string]string{"/home/kubernetes/kubelet-config.yaml": "serverTLSBootstrap: true"},
			certs:     map[string]string{"/var/lib/kubelet/pki/kubelet-server-current.pem": certificate},
			kubeconfs: map[string]string{"/var/lib/kubelet/kubeconfig": kubeconfig}},
		"RKE2": {comm: "kubelet",
			argv:      []string{"kubelet", "--cert-dir=/var/lib/kubelet/pki", "--config-dir=/var/lib/rancher/rke2/agent/etc/kubelet.conf.d", "--kubeconfig=/var/lib/rancher/rke2/agent/kubelet.kubeconfig"},
			config:    map[string]string{"/var/lib/rancher/rke2/agent/etc/kubelet.conf.d/00-rke2-defaults.conf": "tlsCertFile: /var/lib/rancher/rke2/agent/serving-kubelet.crt"},
			certs:     map[string]string{"/var/lib/rancher/rke2/agent/serving-kubelet.crt": certificate},
			kubeconfs: map[string]string{"/var/lib/rancher/rke2/agent/kubelet.kubeconfig": kubeconfig}},
		// Its serving certificate is signed by the cluster's CA.
		"k3s": {comm: "k3s-agent", argv: []string{"/usr/local/bin/k3s agent"},
			kubeconfs: map[string]string{"/var/lib/rancher/k3s/agent/kubelet.kubeconfig": kubeconfig}},
		"k0s": {comm: "kubelet",
			argv:      []string{"/var/lib/k0s/bin/kubelet", "--root-dir=/var/lib/k0s/kubelet", "--cert-dir=/var/lib/k0s/kubelet/pki", "--kubeconfig=/var/lib/k0s/kubelet.conf"},
			certs:     map[string]string{"/var/lib/k0s/kubelet/pki/kubelet.crt": certificate},
			kubeconfs: map[string]string{"/var/lib/k0s/kubelet.conf": kubeconfig}},
		"MicroK8s": {comm: "kubelite",
			argv: []string{"/snap/microk8s/1/kubelite", "--kubelet-args-file=/var/snap/microk8s/1/args/kubelet"},
			config: map[string]string{"/var/snap/microk8s/1/args/kubelet": "--kubeconfig=${SNAP_DATA}/credentials/kubelet.config\n" +
				"--cert-dir=${SNAP_DATA}/certs\n--root-dir=${SNAP_COMMON}/var/lib/kubelet"},
			certs:     map[string]string{"/var/snap/microk8s/1/certs/kubelet.crt": certificate},
			kubeconfs: map[string]string{"/var/snap/microk8s/1/credentials/kubelet.config": kubeconfig}},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{}
			for _, m := range []map[string]string{test.config, test.certs, test.kubeconfs} {
				maps.Copy(files, m)
			}
			h := hosttest.Parse(t, kubeletHost(test.comm, files, test.argv...))
			if got := kubeletServer(h); got != "https://api.example:6443" {
				t.Errorf("the kubelet's API server is %q", got)
			}
			if test.certs == nil {
				return
			}
			k := kubelet{caFile: filepath.Join(t.TempDir(), "none"), names: []string{"n1"}, view: func() host.View { return h }}
			if err := k.verify([]*x509.Certificate{der}); err != nil {
				t.Error(err)
			}
			if err := k.verify([]*x509.Certificate{another}); err == nil {
				t.Error("any certificate is taken for the kubelet's")
			}
		})
	}
}

// selfSigned is a certificate as a kubelet without a signer makes it.
func selfSigned() (string, *x509.Certificate) {
	p := (*pki.Authority)(nil).Issue("n1")
	return strings.TrimSpace(string(p.CertPEM())), p.Cert
}
