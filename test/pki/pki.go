// Package pki makes certificate authorities and certificates, for the test cluster
// and for tests. Its functions panic where no certificate can be made, which is a
// mistake of who calls them. Keys are elliptic, because an emulated processor takes
// seconds for an RSA handshake.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"time"
)

// Authority signs certificates.
type Authority struct{ self Pair }

// Pair is a certificate and its key.
type Pair struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes an authority.
func NewAuthority(name string) *Authority {
	return &Authority{(*Authority)(nil).Issue(name, func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		c.ExtKeyUsage = nil
	})}
}

// Issue makes a certificate of a server and client with this common name, valid
// from a month ago, for tests move the clock of the node backwards, to in a year.
// It has no names to serve for unless a change gives it some. An Authority of nil
// has it sign itself.
func (a *Authority) Issue(commonName string, changes ...func(*x509.Certificate)) Pair {
	key := NewKey()
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             now.AddDate(0, -1, 0),
		NotAfter:              now.AddDate(1, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, change := range changes {
		change(template)
	}
	by := Pair{template, key}
	if a != nil {
		by = a.self
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.Cert, key.Public(), by.key)
	if err != nil {
		panic(fmt.Sprintf("a certificate for %s: %v", commonName, err))
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(fmt.Sprintf("a certificate for %s: %v", commonName, err))
	}
	return Pair{cert, key}
}

// For has a certificate serve for these host names and addresses, and no others.
func For(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = nil, nil
		for _, n := range names {
			if ip := net.ParseIP(n); ip != nil {
				c.IPAddresses = append(c.IPAddresses, ip)
			} else {
				c.DNSNames = append(c.DNSNames, n)
			}
		}
	}
}

// Of makes a certificate's subject a member of groups.
func Of(groups ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.Subject.Organization = groups }
}

// CertPEM is the authority's own certificate.
func (a *Authority) CertPEM() []byte { return a.self.CertPEM() }

// Pool holds the authority alone.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.self.Cert)
	return pool
}

// TLS is the pair as a server or client shows it.
func (p Pair) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{p.Cert.Raw}, PrivateKey: p.key}
}

// CertPEM is the certificate in PEM.
func (p Pair) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Cert.Raw})
}

// KeyPEM is the key in PEM.
func (p Pair) KeyPEM() []byte { return KeyPEM(p.key) }

// NewKey makes a key.
func NewKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// KeyPEM is a key in PEM.
func KeyPEM(key *ecdsa.PrivateKey) []byte {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		panic(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}
