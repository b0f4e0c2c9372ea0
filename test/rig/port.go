package rig

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// freePort returns a TCP and UDP port of the loopback that nobody uses. It
// looks below the range the kernel hands out for outgoing connections, where a
// port could be taken between our choosing it and the program's binding it.
func freePort() (int, error) {
	for range 200 {
		port := 20000 + rand.IntN(12000)
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		l, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		u, udpErr := net.ListenPacket("udp", addr)
		if udpErr == nil {
			u.Close()
		}
		if err := l.Close(); err != nil {
			return 0, fmt.Errorf("choosing a port: %w", err)
		}
		if udpErr == nil {
			return port, nil
		}
	}
	return 0, errors.New("choosing a port: 200 tries found none free")
}

// freePorts returns several different free ports.
func freePorts(n int) ([]int, error) {
	seen := map[int]bool{}
	var ports []int
	for len(ports) < n {
		p, err := freePort()
		if err != nil {
			return nil, err
		}
		if !seen[p] {
			seen[p] = true
			ports = append(ports, p)
		}
	}
	return ports, nil
}
