package rig

import (
	"encoding/base64"
	"fmt"

	"github.com/hosthygiene/agent/test/pki"
)

// kubeconfig is laid out as kubeadm writes it, which is what the agent reads
// the API server's address from on a real node.
func kubeconfig(ca *pki.Authority, server, user string, client pki.Pair) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: %s
    server: %s
  name: rig
contexts:
- context:
    cluster: rig
    user: %s
  name: rig
current-context: rig
kind: Config
users:
- name: %s
  user:
    client-certificate-data: %s
    client-key-data: %s
`, b64(ca.CertPEM()), server, user, user, b64(client.CertPEM()), b64(client.KeyPEM()))
}
