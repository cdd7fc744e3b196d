//go:build unix

package transport

import (
	"net"
	"syscall"
)

// growBuffers asks for large socket buffers and returns what the kernel granted, in bytes as it counts them.
func growBuffers(c *net.UDPConn) (read, write int) {
	_ = c.SetReadBuffer(wantedUDPBuffer)
	_ = c.SetWriteBuffer(wantedUDPBuffer)
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, 0
	}
	_ = raw.Control(func(fd uintptr) {
		read, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF)
		write, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
	})
	return read, write
}
